"""One reply over three protocols: their clients' own code merges each stream to the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic.types
import openai.types.responses
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.chat import ChatCompletion
from pydantic import TypeAdapter

from tests.frontend.test_streams_joined import (
    ARGUMENTS,
    CALLS,
    CHAT,
    HI,
    PROSE,
    SEEDS,
    Client,
    message_of,
    open_clients,
    parted,
)

NAMES = ("get_time", "add")
SCHEMA: dict[str, Any] = {"type": "object"}
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(openai.types.responses.ResponseStreamEvent)
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[str, Client]]:
    yield from open_clients()


def events_of(data: bytes) -> list[Any]:
    *frames, rest = data.decode().split("\n\n")
    assert rest == ""
    return [json.loads(frame.split("\n")[1].removeprefix("data: ")) for frame in frames]


def chat(client: Client, limits: dict[str, int]) -> dict[str, Any]:
    functions = [{"name": name, "parameters": SCHEMA} for name in NAMES]
    tools = [{"type": "function", "function": function} for function in functions]
    body: dict[str, Any] = {"messages": HI, "tools": tools, **limits}
    whole = ChatCompletion.model_validate_json(client.post(CHAT, body), strict=True)
    return message_of(whole.choices[0])


def response(client: Client, limits: dict[str, int]) -> dict[str, Any]:
    """From the stream of /v1/responses, its last event, which has it all, left out."""
    tools = [{"type": "function", "name": name, "parameters": SCHEMA} for name in NAMES]
    body: dict[str, Any] = {"input": "hi", "tools": tools, "stream": True}
    if limits:
        body["max_output_tokens"] = limits["max_tokens"]
    *events, last = events_of(client.post("/v1/responses", body))
    state: Any = ResponseStreamState(text_format=omit, input_tools=omit)
    for event in events:
        state.handle_event(RESPONSE_EVENT.validate_python(event, strict=True))
    items = state._ResponseStreamState__current_snapshot.output
    calls = [item for item in items if item.type == "function_call"]
    content = [part.text for item in items if item.type == "message" for part in item.content]
    return {
        "content": "".join(content),
        "calls": [("function", call.name, call.arguments) for call in calls],
        "cut": last["response"]["status"] == "incomplete",
    }


def message(client: Client, limits: dict[str, int]) -> dict[str, Any]:
    """From the stream of /v1/messages."""
    tools = [{"name": name, "input_schema": SCHEMA} for name in NAMES]
    body: dict[str, Any] = {"model": "org/tiny", "max_tokens": 5000, "messages": HI}
    body |= {"tools": tools, "stream": True, **limits}
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events_of(client.post("/v1/messages", body)):
        snapshot = accumulate_event(
            event=MESSAGE_EVENT.validate_python(event, strict=True),
            current_snapshot=snapshot,
            json_bufs=buffers,
        )
    blocks = snapshot.content
    return {
        "content": "".join(block.text for block in blocks if block.type == "text"),
        "thought": "".join(block.thinking for block in blocks if block.type == "thinking"),
        "calls": [
            ("function", block.name, buffers.get(i, b"").decode())
            for i, block in enumerate(blocks)
            if block.type == "tool_use"
        ],
        "cut": snapshot.stop_reason == "max_tokens",
    }


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, str]:
    """A template, and text and calls as a model with it would write them."""
    template = draw(st.sampled_from(sorted(CALLS)))
    names_and_arguments = st.tuples(st.sampled_from(NAMES), ARGUMENTS)
    calls = draw(st.lists(names_and_arguments, max_size=3))
    text = draw(PROSE) + "".join(CALLS[template].format(name=n, arguments=a) for n, a in calls)
    text += draw(st.just("") | PROSE)
    return template, f"<think>{draw(PROSE)}</think>{text}" if draw(st.booleans()) else text


def check_same(
    clients: dict[str, Client], reply: tuple[str, str], limits: dict[str, int], seeds: list[int]
) -> None:
    template, text = reply
    client = clients[template]
    client.model.say(parted(text), seeds[0])
    client.model.step_seed = seeds[1]
    expected = chat(client, limits)
    expected["cut"] = expected.pop("finish") == "length"
    client.model.step_seed = seeds[2]
    assert message(client, limits) == expected
    client.model.step_seed = seeds[3]
    del expected["thought"]  # which openai's code does not merge
    assert response(client, limits) == expected


LIMITS = st.just({}) | st.fixed_dictionaries({"max_tokens": st.integers(1, 120)})


@settings(max_examples=25, deadline=None)
@given(replies(), LIMITS, st.lists(SEEDS, min_size=4, max_size=4))
def test_a_reply_is_the_same_over_every_route(
    clients: dict[str, Client], reply: tuple[str, str], limits: dict[str, int], seeds: list[int]
) -> None:
    check_same(clients, reply, limits, seeds)


@pytest.mark.soak
@settings(max_examples=2000, deadline=None)
@given(replies(), LIMITS, st.lists(SEEDS, min_size=4, max_size=4))
def test_many_replies_are_the_same_over_every_route(
    clients: dict[str, Client], reply: tuple[str, str], limits: dict[str, int], seeds: list[int]
) -> None:
    check_same(clients, reply, limits, seeds)
