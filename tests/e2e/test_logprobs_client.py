"""Log probabilities through the openai client."""

from __future__ import annotations

import functools
import math

import openai
import pytest

from tests.support.questions import ANSWERS, COUNT, ask

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_returns_each_token_and_its_top_logprobs(client: openai.OpenAI) -> None:
    request = ask(COUNT, logprobs=True, top_logprobs=3)
    (choice,) = client.chat.completions.create(**request).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).startswith(ANSWERS[COUNT])
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001
    streamed = [
        token
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    # The prompt is cached now; the shorter prefill rounds in another order.
    expected = [token.logprob for token in tokens]
    assert [token.logprob for token in streamed] == pytest.approx(expected, abs=1e-4)


def test_an_echo_scores_the_prompt_as_lm_eval_reads_it(client: openai.OpenAI) -> None:
    prompt = PROMPT.format("Spell river.") + "r-i-v-e-r<|im_end|>"
    completion = client.completions.create(
        model="demo", prompt=prompt, echo=True, max_tokens=0, logprobs=1, temperature=0
    )
    (choice,) = completion.choices
    logprobs = choice.logprobs
    assert completion.usage is not None
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    num_tokens = completion.usage.prompt_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == num_tokens
    assert completion.usage.completion_tokens == 0
    assert num_tokens > 10
    assert choice.text == prompt
    assert logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    # Each token of the answer that the model would give is among the most likely ones.
    for token, top in list(zip(logprobs.tokens, logprobs.top_logprobs, strict=True))[-5:]:
        assert token in top


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_returns_offsets_into_its_text(client: openai.OpenAI, stream: bool) -> None:
    text = ""
    tokens: list[str] = []
    offsets: list[int] = []
    prompt = PROMPT.format(COUNT)
    create = functools.partial(client.completions.create, model="demo", prompt=prompt, logprobs=0)
    replies = create(max_tokens=8, stream=True) if stream else [create(max_tokens=8)]
    for reply in replies:
        (choice,) = reply.choices
        text += choice.text
        if choice.logprobs is not None:
            tokens += choice.logprobs.tokens or []
            offsets += choice.logprobs.text_offset or []
    assert len(tokens) == len(offsets) == 8
    assert "".join(tokens) == text
    assert offsets == [len("".join(tokens[:i])) for i in range(8)]
