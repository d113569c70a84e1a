"""The official clients see one unbroken reply over a death; without resuming they raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import anthropic
import openai
import pytest
from tokenizers import Tokenizer

from tests.processes.test_restarts import metric
from tests.support.hash_engine import expected_output
from tests.support.server_process import (
    VOCAB_SIZE,
    ServerProcess,
    num_open,
    running,
    status_of,
    wait_until,
)

STEP_S = 0.04
NAME = ("--served-model-name", "bytes")
NUM_TOKENS = 150
EOS_ID = VOCAB_SIZE - 1
ENDS = ("length", "incomplete", "max_tokens")  # of chats, responses and messages


@dataclass(frozen=True)
class Question:
    """A prompt, and the NUM_TOKENS tokens of text that follow it, without an end in between."""

    prompt: str
    text: str

    @property
    def messages(self) -> Any:
        return [{"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Answer:
    """ends: why it ended, as often as the reply says so."""

    text: str
    num_tokens: int
    ends: list[str | None]


class ResponseFailed(Exception):
    """The last event of a stream of the Responses API, at which the client does not raise."""


@pytest.fixture(scope="module")
def question(model_dir: Path) -> Question:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    for number in count():
        prompt = f"go on, number {number}"
        ids = expected_output(tokenizer.encode(prompt).ids, NUM_TOKENS, VOCAB_SIZE)
        if EOS_ID not in ids:
            return Question(prompt, tokenizer.decode(ids))
    raise AssertionError


class Clients:
    """All ways to ask a server. A stream calls `begun` when its first text has arrived."""

    def __init__(self, url: str, question: Question, begun: Callable[[], object]) -> None:
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._anthropic = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        # Loaded at the first use, which takes as long as a whole reply.
        _ = self._openai.chat.completions, self._openai.responses, self._anthropic.messages
        self._question, self._begun = question, begun
        self._chat: Any = {
            "model": "bytes",
            "messages": question.messages,
            "max_completion_tokens": NUM_TOKENS,
        }
        self._response: Any = {
            "model": "bytes",
            "input": question.prompt,
            "max_output_tokens": NUM_TOKENS,
        }
        self._message: Any = {
            "model": "bytes",
            "messages": question.messages,
            "max_tokens": NUM_TOKENS,
        }

    def _beginning(self, events: Any) -> Iterator[Any]:
        """The events; `begun` is called between those with text."""
        called = False
        for event in events:
            yield event
            if not called and _has_text(event):
                called = True
                self._begun()

    def chat(self) -> Answer:
        reply: Any = self._openai.chat.completions.create(**self._chat)
        (choice,) = reply.choices
        return Answer(choice.message.content, reply.usage.completion_tokens, [choice.finish_reason])

    def chat_stream(self) -> Answer:
        options: Any = {"include_usage": True}
        stream: Any = self._openai.chat.completions.create(
            **self._chat, stream=True, stream_options=options
        )
        text, num_tokens, ends, ids = "", 0, list[str | None](), set[str]()
        for chunk in self._beginning(stream):
            ids.add(chunk.id)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                ends += [choice.finish_reason] if choice.finish_reason else []
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
        assert len(ids) == 1
        return Answer(text, num_tokens, ends)

    def response(self) -> Answer:
        reply: Any = self._openai.responses.create(**self._response)
        return Answer(reply.output_text, reply.usage.output_tokens, [reply.status])

    def response_stream(self) -> Answer:
        stream: Any = self._openai.responses.create(**self._response, stream=True)
        text, num_tokens, ends, numbers = "", 0, list[str | None](), []
        for event in self._beginning(stream):
            numbers.append(event.sequence_number)
            text += event.delta if event.type == "response.output_text.delta" else ""
            if event.type == "response.failed":
                raise ResponseFailed(event.response.error.message)
            if event.type in ("response.completed", "response.incomplete"):
                ends.append(event.response.status)
                num_tokens = event.response.usage.output_tokens
                assert event.response.output_text == text
        assert numbers == list(range(len(numbers)))
        return Answer(text, num_tokens, ends)

    def message(self) -> Answer:
        reply: Any = self._anthropic.messages.create(**self._message)
        (block,) = reply.content
        return Answer(block.text, reply.usage.output_tokens, [reply.stop_reason])

    def message_stream(self) -> Answer:
        types = Counter[str]()
        with self._anthropic.messages.stream(**self._message) as stream:
            for event in self._beginning(stream):
                types[event.type] += 1
            reply: Any = stream.get_final_message()
        (block,) = reply.content
        assert types["message_start"] == types["message_stop"] == types["content_block_stop"] == 1
        return Answer(block.text, reply.usage.output_tokens, [reply.stop_reason])

    @property
    def streams(self) -> list[Callable[[], Answer]]:
        return [self.chat_stream, self.response_stream, self.message_stream]

    @property
    def whole(self) -> list[Callable[[], Answer]]:
        return [self.chat, self.response, self.message]


def _has_text(event: Any) -> bool:
    """Whether an event of any of the three APIs has text."""
    if choices := getattr(event, "choices", None):
        return bool(choices[0].delta.content)
    return event.type in ("response.output_text.delta", "content_block_delta")


def outcome(ask: Callable[[], Answer]) -> Answer | Exception:
    try:
        return ask()
    except Exception as error:
        return error


def ask_over_a_death(server: ServerProcess, question: Question) -> list[Answer | Exception]:
    """What three streams and three whole replies become when the scheduler is killed in them."""
    begun = Barrier(4)
    clients = Clients(server.url, question, lambda: begun.wait(60))
    asks = [*clients.whole, *clients.streams]
    with ThreadPoolExecutor(len(asks)) as pool:
        asked = [pool.submit(outcome, ask) for ask in asks]
        with suppress(BrokenBarrierError):  # a stream that fails before is among the results
            begun.wait(60)
            wait_until(lambda: num_open(server.url) == len(asks))
        server.child("scheduler").kill()
        return [one.result(120) for one in asked]


def test_the_clients_see_one_unbroken_reply(
    model_dir: Path, socket_dir: Path, question: Question
) -> None:
    with running("--model", str(model_dir), *NAME, tmp_dir=socket_dir, step_s=STEP_S) as server:
        answers = ask_over_a_death(server, question)
        expected = [Answer(question.text, NUM_TOKENS, [end]) for end in ENDS]
        assert answers == expected * 2
        assert metric(server, "restarts_total") == 1
        assert metric(server, "resumed_requests_total") == 6


def test_without_resuming_the_clients_raise(
    model_dir: Path, socket_dir: Path, question: Question
) -> None:
    arguments = ("--model", str(model_dir), *NAME, "--no-resume")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        answers = ask_over_a_death(server, question)
        whole = (openai.APIStatusError, openai.APIStatusError, anthropic.APIStatusError)
        streamed = (openai.APIError, ResponseFailed, anthropic.APIError)
        for answer, error_type in zip(answers, (*whole, *streamed), strict=True):
            assert isinstance(answer, error_type), answer
            assert "scheduler process has died" in str(answer)
        assert [getattr(answers[i], "code", None) for i in (0, 3)] == ["engine_restarted"] * 2
        assert [getattr(answer, "status_code", None) for answer in answers[:3]] == [503] * 3
        wait_until(lambda: status_of(f"{server.url}/ready") == 200)
        clients = Clients(server.url, question, lambda: None)
        assert clients.chat() == Answer(question.text, NUM_TOKENS, ["length"])
