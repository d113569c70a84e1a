"""Log-probabilities and echoes over HTTP, in OpenAI's shapes; a played model tells known values."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob

from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

TEXT = "the quick 你好 \U0001f600 é server, <tool_call>"
HI: list[Any] = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def played() -> Iterator[HttpServer]:
    with serve(make_backend=functools.partial(PlayedModel, template=TEMPLATES["hermes"])) as made:
        yield made


def post(server: HttpServer, path: str, text: str = TEXT, **body: Any) -> bytes:
    server.backend.text = text  # type: ignore[attr-defined]
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.content


def chat(server: HttpServer, text: str = TEXT, **body: Any) -> ChatCompletion:
    content = post(server, "/v1/chat/completions", text, messages=HI, logprobs=True, **body)
    return ChatCompletion.model_validate_json(content, strict=True)


def complete(server: HttpServer, **body: Any) -> Any:
    """The reply's JSON; strictly OpenAI's but for the nulls of a prompt's first token."""
    value = json.loads(post(server, "/v1/completions", **body))
    checked = json.loads(json.dumps(value))
    for choice in checked["choices"]:
        for name in ("token_logprobs", "top_logprobs"):
            entries = (choice["logprobs"] or {}).get(name, [])
            choice["logprobs"] and entries[:1] == [None] and entries.pop(0)
    Completion.model_validate(checked, strict=True)
    return value


def streamed(server: HttpServer, path: str, text: str = TEXT, **body: Any) -> list[Any]:
    content = post(server, path, text, stream=True, **body).decode()
    *events, last, rest = content.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def told(completion: ChatCompletion) -> list[ChatCompletionTokenLogprob]:
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.refusal is None
    return logprobs.content or []


def test_a_chat_reports_every_token_with_its_bytes(played: HttpServer) -> None:
    completion = chat(played, top_logprobs=2)
    tokens = told(completion)
    assert completion.usage is not None
    assert len(tokens) == completion.usage.completion_tokens
    spelled = b"".join(bytes(token.bytes or []) for token in tokens)
    assert spelled == (TEXT + "</s>").encode()
    assert any("\\x" in token.token for token in tokens), "no token is a part of a character"
    for token in tokens:
        assert token.logprob == -1
        assert [top.logprob for top in token.top_logprobs] == [-1, -2]
        assert token.top_logprobs[0].token == token.token
        assert bytes(token.bytes or []).decode(errors="backslashreplace") == token.token


def test_top_logprobs_are_left_out_unless_asked_for(played: HttpServer) -> None:
    assert all(token.top_logprobs == [] for token in told(chat(played)))


@pytest.mark.parametrize("text", [TEXT, f"<think>so</think>{TEXT}", f"Yes.\n{CALL}"])
def test_a_streams_log_probabilities_join_to_those_of_the_whole(
    played: HttpServer, text: str
) -> None:
    body: dict[str, Any] = {"tools": TOOLS, "top_logprobs": 1}
    expected = told(chat(played, text, **body))
    path = "/v1/chat/completions"
    tokens = list[ChatCompletionTokenLogprob]()
    for event in streamed(played, path, text, messages=HI, logprobs=True, **body):
        (choice,) = ChatCompletionChunk.model_validate(event, strict=True).choices
        if choice.logprobs is not None:
            assert choice.delta.role is None
            tokens += choice.logprobs.content or []
    assert tokens == expected


def test_a_completion_reports_four_lists(played: HttpServer) -> None:
    value = complete(played, prompt="hi", max_tokens=99, logprobs=2)
    (choice,) = value["choices"]
    logprobs = choice["logprobs"]
    count = value["usage"]["completion_tokens"]
    assert [len(entries) for entries in logprobs.values()] == [count] * 4
    assert logprobs["token_logprobs"] == [-1] * count
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -1
        assert len(top) == 2
    check_offsets(choice["text"], logprobs)


def check_offsets(text: str, logprobs: dict[str, Any]) -> None:
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\\x" in token or token in ("</s>", "<s>") or text.startswith(token, offset)


def test_none_of_the_likeliest_means_only_the_token(played: HttpServer) -> None:
    logprobs = complete(played, prompt="hi", logprobs=0)["choices"][0]["logprobs"]
    assert all(top == {token: -1} for token, top in zip(*tokens_and_top(logprobs), strict=True))


def tokens_and_top(logprobs: dict[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    return logprobs["tokens"], logprobs["top_logprobs"]


@pytest.mark.parametrize("prompt", ["Once upon é a 你 time", [40, 41, 300, 9, 250]])
def test_an_echo_puts_the_prompt_before_the_text(played: HttpServer, prompt: Any) -> None:
    plain = complete(played, prompt=prompt, max_tokens=99)
    value = complete(played, prompt=prompt, max_tokens=99, echo=True)
    tokenizer = played.backend.tokenizer  # type: ignore[attr-defined]
    shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    assert value["choices"][0]["text"] == shown + plain["choices"][0]["text"]
    assert value["choices"][0]["logprobs"] is None
    assert value["usage"] == plain["usage"]


def test_an_echo_has_the_prompts_log_probabilities_first(played: HttpServer) -> None:
    value = complete(played, prompt="Once upon é a time", max_tokens=5, echo=True, logprobs=1)
    (choice,), usage = value["choices"], value["usage"]
    logprobs = choice["logprobs"]
    count = usage["prompt_tokens"] + usage["completion_tokens"]
    assert [len(entries) for entries in logprobs.values()] == [count] * 4
    assert logprobs["token_logprobs"] == [None] + [-1] * (count - 1)
    assert logprobs["top_logprobs"][0] is None
    check_offsets(choice["text"], logprobs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["<s>hi</s> there, é", "<s>你😀</s>", "e\u0301 e\u0301", "x"])
def test_offsets_count_in_the_prompt_as_it_was_sent(
    played: HttpServer, prompt: str, stream: bool
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 6}
    text, tokens, offsets = "", list[str](), list[int]()
    if stream:
        choices = [event["choices"][0] for event in streamed(played, "/v1/completions", **body)]
    else:
        choices = complete(played, **body)["choices"]
    for choice in choices:
        text += choice["text"]
        if choice["logprobs"]:
            tokens += choice["logprobs"]["tokens"]
            offsets += choice["logprobs"]["text_offset"]
    assert text.startswith(prompt)
    for token, offset in zip(tokens, offsets, strict=True):
        assert "\\x" in token or text.startswith(token, offset), (token, offset)
    assert len(prompt) in offsets


def test_what_an_evaluation_harness_reads_is_there(played: HttpServer) -> None:
    """As lm-eval's local-completions scores a continuation of a context."""
    context, continuation = [40, 41, 42, 43], [60, 61, 62]
    value = complete(
        played,
        prompt=[[*context, *continuation]],
        echo=True,
        logprobs=1,
        max_tokens=1,
        temperature=0,
        seed=1234,
    )
    logprobs = value["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(context) + len(continuation) + 1
    scored = logprobs["token_logprobs"][len(context) : -1]
    assert scored == [-1] * len(continuation)
    tokens, top = (logprobs[name][len(context) : -1] for name in ("tokens", "top_logprobs"))
    for token, best in zip(tokens, top, strict=True):
        assert max(best, key=best.__getitem__) == token


def test_without_output_only_the_prompt_comes_back(played: HttpServer) -> None:
    body: dict[str, Any] = {"prompt": ["Once upon", "a time"], "max_tokens": 0, "echo": True}
    value = complete(played, logprobs=1, n=2, timings=True, **body)
    assert value["timings"]["decode_tokens_per_s"] is None
    assert [c["text"] for c in value["choices"]] == ["Once upon"] * 2 + ["a time"] * 2
    assert {c["finish_reason"] for c in value["choices"]} == {"length"}
    assert value["usage"]["completion_tokens"] == 0
    assert all(c["logprobs"]["token_logprobs"][0] is None for c in value["choices"])
    events = streamed(played, "/v1/completions", logprobs=1, **body)
    texts = ["", ""]
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["Once upon", "a time"]


@pytest.mark.parametrize("echo", [False, True])
def test_a_completions_stream_joins_to_the_whole(played: HttpServer, echo: bool) -> None:
    body = {"prompt": "Once upon é", "max_tokens": 99, "logprobs": 1, "echo": echo}
    expected = complete(played, **body)["choices"][0]
    text, joined = "", {name: list[Any]() for name in expected["logprobs"]}
    for event in streamed(played, "/v1/completions", **body):
        (choice,) = event["choices"]
        text += choice["text"]
        for name, entries in (choice["logprobs"] or {}).items():
            joined[name] += entries
    assert (text, joined) == (expected["text"], expected["logprobs"])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": 2}, "logprobs"),
        ("/v1/completions", {"logprobs": 21}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"max_tokens": 0, "echo": False, "logprobs": 1}, "max_tokens"),
        ("/v1/completions", {"max_tokens": -1, "echo": True}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    played: HttpServer, path: str, fields: dict[str, Any], param: str
) -> None:
    response = played.http.post(path, json={"prompt": "hi", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
