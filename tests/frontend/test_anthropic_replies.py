"""POST /v1/messages as the `anthropic` package reads it: text, thoughts and calls."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from minisrv.frontend.generation import run as responder
from tests.support.anthropic_bodies import HI, PATH
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.scripted_backend import TEXT

SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOLS: list[Any] = [
    {"name": name, "description": "Tell it.", "input_schema": SCHEMA}
    for name in ("get_time", "add")
]
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
WRITTEN = {
    "hermes": f"Yes.\n{CALL}\n{CALL}",
    "llama": '<|python_tag|>{"name": "get_time", "parameters": {"zone": "UTC"}}; '
    '{"name": "get_time", "parameters": {"zone": "UTC"}}',
    "mistral": "Yes." + '[TOOL_CALLS]get_time[ARGS]{"zone": "UTC"}' * 2,
}
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, HttpServer]]:
    made = {}
    contexts = []
    for name, template in TEMPLATES.items():
        context = serve(make_backend=functools.partial(PlayedModel, template=template))
        contexts.append(context)
        made[name] = context.__enter__()
    yield made
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def hermes(servers: dict[str, HttpServer]) -> HttpServer:
    return servers["hermes"]


def client_of(server: HttpServer) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def assert_no_extras(value: Any) -> None:
    """No field that the package's types do not have."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, value
        value = [getattr(value, name) for name in type(value).model_fields]
    for part in value if isinstance(value, list) else []:
        assert_no_extras(part)


def whole(server: HttpServer, text: str, **body: Any) -> Message:
    server.backend.text = text  # type: ignore[attr-defined]
    body = {"messages": HI, "max_tokens": 1000, **body}
    response = server.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    message = Message.model_validate_json(response.content, strict=True)
    assert_no_extras(message)
    return message


def events(server: HttpServer, text: str, **body: Any) -> list[Any]:
    """The events of a stream, each checked and under its own name."""
    server.backend.text = text  # type: ignore[attr-defined]
    body = {"messages": HI, "max_tokens": 1000, "stream": True, **body}
    response = server.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    *frames, rest = response.content.decode().split("\n\n")
    assert rest == ""
    read = []
    for frame in frames:
        head, data = frame.split("\n")
        event = EVENTS.validate_python(json.loads(data.removeprefix("data: ")), strict=True)
        assert head == f"event: {event.type}"
        assert_no_extras(event)
        read.append(event)
    return read


def joined(server: HttpServer, text: str, **body: Any) -> Message:
    """What the package's own helper makes of a stream."""
    server.backend.text = text  # type: ignore[attr-defined]
    fields = {"model": "", "messages": HI, "max_tokens": 1000, **body}
    with client_of(server) as client, client.messages.stream(**fields) as stream:
        return Message.model_validate(stream.get_final_message().to_dict())


def parts(message: Message) -> Any:
    """All of a message but what differs from reply to reply."""
    values = message.to_dict(exclude_none=True)
    del values["id"]
    for block in values["content"]:  # type: ignore[attr-defined]
        block.pop("id", None)
        block.pop("parsed_output", None)
    return values


def test_text_comes_whole(hermes: HttpServer) -> None:
    response = hermes.http.post(
        PATH,
        json={"messages": HI, "max_tokens": 9, "model": "org/tiny"},
        headers={"X-Request-Id": "abc", "anthropic-version": "2023-06-01"},
    )
    assert response.headers["request-id"] == "abc"
    hermes.backend.text = "Hello"  # type: ignore[attr-defined]
    message = whole(hermes, "Hello", request_id="abc")
    usage = {"input_tokens": 20, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    usage |= {"output_tokens": 6, "output_tokens_details": {"thinking_tokens": 0}}
    assert message.to_dict() == {
        "id": "msg_abc",
        "type": "message",
        "role": "assistant",
        "model": "org/tiny",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }


def test_a_stream_has_its_events_in_order(hermes: HttpServer) -> None:
    stream = events(hermes, f"<think>hm</think>Hello {CALL}", tools=TOOLS)
    kinds = [event.type for event in stream]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    blocks = [event for event in stream if event.type == "content_block_start"]
    assert [block.content_block.type for block in blocks] == ["thinking", "text", "tool_use"]
    opened: int | None = None
    for event in stream[1:-2]:
        if event.type == "content_block_start":
            assert opened is None
            opened = event.index
        assert event.index == opened
        opened = None if event.type == "content_block_stop" else opened
    assert opened is None
    assert stream[0].message.usage.input_tokens == stream[-2].usage.input_tokens > 0
    assert stream[-2].delta.stop_reason == "tool_use"


@pytest.mark.parametrize("text", ["Hello", "", "<think>a</think>", "<think>a\nb</think>\n\nc"])
def test_a_stream_joins_to_the_whole_reply(hermes: HttpServer, text: str) -> None:
    assert parts(joined(hermes, text)) == parts(whole(hermes, text))


def test_a_thought_is_a_block_of_its_own_and_counted(hermes: HttpServer) -> None:
    message = whole(hermes, "<think>\nLet me see \U0001f914\n</think>\n\nHello")
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "Let me see \U0001f914", "signature": "minisrv"},
        {"type": "text", "text": "Hello"},
    ]
    assert message.usage.output_tokens_details is not None
    tokenizer = hermes.backend.tokenizer  # type: ignore[attr-defined]
    thinking = len(tokenizer.encode("<think>\nLet me see \U0001f914\n</think>"))
    assert message.usage.output_tokens_details.thinking_tokens == thinking


def test_a_thought_that_is_not_to_be_shown_has_no_text(hermes: HttpServer) -> None:
    body = {"thinking": {"type": "adaptive", "display": "omitted"}}
    message = whole(hermes, "<think>secret</think>Hello", **body)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert "secret" not in message.to_json()
    assert parts(joined(hermes, "<think>secret</think>Hello", **body)) == parts(message)


@pytest.mark.parametrize("template", WRITTEN)
def test_calls_are_blocks(servers: dict[str, HttpServer], template: str) -> None:
    server = servers[template]
    message = whole(server, WRITTEN[template], tools=TOOLS)
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("get_time", {"zone": "UTC"})] * 2
    assert calls[0].id != calls[1].id
    text = [block.text for block in message.content if block.type == "text"]
    assert text == ([] if template == "llama" else ["Yes."])
    assert message.stop_reason == "tool_use"
    assert parts(joined(server, WRITTEN[template], tools=TOOLS)) == parts(message)


def test_the_arguments_come_in_more_than_one_piece(hermes: HttpServer) -> None:
    deltas = [e.delta for e in events(hermes, CALL, tools=TOOLS) if e.type == "content_block_delta"]
    assert len(deltas) > 3
    assert {delta.type for delta in deltas} == {"input_json_delta"}


def test_a_call_that_is_cut_off_is_read_as_far_as_it_goes(hermes: HttpServer) -> None:
    full = len(hermes.backend.tokenizer.encode(CALL))  # type: ignore[attr-defined]
    inputs = set()
    for max_tokens in range(1, full):
        message = whole(hermes, CALL, tools=TOOLS, max_tokens=max_tokens)
        assert message.stop_reason == "max_tokens"
        assert parts(joined(hermes, CALL, tools=TOOLS, max_tokens=max_tokens)) == parts(message)
        inputs |= {json.dumps(b.input) for b in message.content if b.type == "tool_use"}
    assert inputs == {"{}", '{"zone": "UTC"}'}


def test_arguments_that_are_not_json_are_shown_as_they_were_written(hermes: HttpServer) -> None:
    text = CALL.replace('"UTC"', "UTC")
    (call,) = whole(hermes, text, tools=TOOLS).content
    assert call.type == "tool_use"
    assert call.input == {"INVALID_JSON": '{"zone": UTC}'}
    deltas = [e.delta for e in events(hermes, text, tools=TOOLS) if e.type == "content_block_delta"]
    assert "".join(delta.partial_json for delta in deltas) == '{"zone": UTC}'


@pytest.mark.parametrize(
    ("text", "fields", "reason", "sequence"),
    [
        ("one STOP two", {"stop_sequences": ["x", "STOP"]}, "stop_sequence", "STOP"),
        ("one two", {"max_tokens": 2}, "max_tokens", None),
        ("one two", {}, "end_turn", None),
        (f"{CALL}{CALL}", {"tools": TOOLS, "stop_sequences": ["zone"]}, "stop_sequence", "zone"),
    ],
)
def test_the_reply_says_why_it_ended(
    hermes: HttpServer, text: str, fields: dict[str, Any], reason: str, sequence: str | None
) -> None:
    for message in (whole(hermes, text, **fields), joined(hermes, text, **fields)):
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
        assert "STOP" not in str(message.content)


CHARS = st.sampled_from('ab \n\u4f60\u0301\U0001f600\u200d<>{}[]"')
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "[ARGS]", "[TOOL_CALLS]", "; "]
PIECES = [CALL, CALL[:40], '[TOOL_CALLS]add[ARGS]{"a": 1}', "<|python_tag|>"]
PIECES.append('{"name": "add", "parameters": {"a": "\u4f60\U0001f600"}}')
SEGMENT = st.text(CHARS, max_size=8) | st.text(max_size=4) | st.sampled_from(MARKS + PIECES)
REPLY = st.lists(SEGMENT, max_size=6).map("".join)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(WRITTEN)), REPLY, st.booleans(), st.integers(1, 9), st.integers(1, 60)
)
def test_the_events_of_a_stream_hold_the_whole_reply(
    servers: dict[str, HttpServer],
    template: str,
    text: str,
    thinking: bool,
    batch: int,
    max_tokens: int,
) -> None:
    server = servers[template]
    text = f"<think>{text}</think>{text}" if thinking else text
    server.backend.batch = batch  # type: ignore[attr-defined]
    body: dict[str, Any] = {"tools": TOOLS, "max_tokens": max_tokens}
    message = whole(server, text, **body)
    start, *stream, end, _ = events(server, text, **body)
    texts: list[str] = []
    for event in stream:
        if event.type == "content_block_start":
            texts.append("")
        elif event.type == "content_block_delta":
            texts[-1] += next(v for n, v in event.delta.to_dict().items() if n != "type")
    for block, joined_text in zip(message.content, texts, strict=True):
        if block.type == "text":
            assert joined_text == block.text
        elif block.type == "thinking":
            assert joined_text == block.thinking + block.signature
        elif "INVALID_JSON" not in str(block):
            assert block.type == "tool_use"
            assert message.stop_reason == "max_tokens" or json.loads(joined_text) == block.input
    assert end.delta.stop_reason == message.stop_reason
    assert end.usage.to_dict() == message.usage.to_dict()
    assert start.message.content == []


def test_what_the_cache_held_counts_apart(server: HttpServer) -> None:
    body = {"messages": HI, "max_tokens": 100}
    usage = server.http.post(PATH, json=body).json()["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (4, 3)


def test_a_silent_stream_is_kept_alive_by_ping_events(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "FIRST_PING_S", 0.01)
    monkeypatch.setattr(responder, "PING_S", 0.01)
    monkeypatch.setattr(server.backend, "_step_s", 0.05)
    body = {"messages": HI, "max_tokens": 100, "stream": True}
    text = server.http.post(PATH, json=body).text
    assert text.startswith('event: ping\ndata: {"type":"ping"}\n\n')
    assert "\n: ping" not in text
    with client_of(server) as client:
        stream = client.messages.stream(model="", messages=HI, max_tokens=100)
        with stream as opened:
            assert opened.get_final_text() == TEXT


def test_a_failure_in_the_stream_is_its_last_event(server: HttpServer) -> None:
    messages = [{"role": "user", "content": "break"}]
    body = {"messages": messages, "max_tokens": 100, "stream": True, "request_id": "abc"}
    *_, last, rest = server.http.post(PATH, json=body).text.split("\n\n")
    assert rest == ""
    head, data = last.split("\n")
    assert head == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error",
        "error": {"type": "api_error", "message": "broken"},
        "request_id": "abc",
    }
