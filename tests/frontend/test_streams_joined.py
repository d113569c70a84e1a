"""Streams, merged by the openai package, are the whole answer, wherever tokens part."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from minisrv.config import ServerConfig
from minisrv.frontend.apis.openai.chat import ChatRenderer
from minisrv.frontend.app import create_app
from minisrv.frontend.generation.event_reader import ChoiceReader
from minisrv.frontend.generation.request import ChatPrompt, ChatRequest
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.sampling_params import SamplingParams
from minisrv.wire.events import Event
from minisrv.wire.messages import Finish
from tests.support.cut_model import CutModel
from tests.support.played_model import TEMPLATES

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_time", "add")
]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Client:
    """The application without sockets: all between the request's bytes and the reply's."""

    model: CutModel
    registry: RequestRegistry
    http: httpx.AsyncClient
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        async def send() -> bytes:
            response = await self.http.post(path, json=body)
            while self.registry.num_open:  # tokens that follow a stop string
                await asyncio.sleep(0)
            assert response.status_code == 200, response.text
            return response.content

        return self.loop.run_until_complete(asyncio.wait_for(send(), 60))


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[str, Client]]:
    yield from open_clients()


def open_clients() -> Iterator[dict[str, Client]]:
    """One for each template; closed when the iterator goes on."""
    loop = asyncio.new_event_loop()
    clients = {name: loop.run_until_complete(open_client(name, loop)) for name in TEMPLATES}
    yield clients
    for client in clients.values():
        loop.run_until_complete(client.http.aclose())
    loop.close()


async def open_client(template: str, loop: asyncio.AbstractEventLoop) -> Client:
    config = ServerConfig(served_model_name="org/tiny")
    registry = RequestRegistry(config)
    model = CutModel(registry, TEMPLATES[template])
    registry.set_ready(model.info)
    transport = httpx.ASGITransport(create_app(config, registry))
    http = httpx.AsyncClient(transport=transport, base_url="http://localhost")
    return Client(model, registry, http, loop)


def events_of(data: bytes) -> list[Any]:
    *events, last, rest = data.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def merged(data: bytes) -> tuple[Any, dict[int, Any], dict[int, list[int]]]:
    """What the openai package makes of a stream, and what it does not know: stop reasons, ids."""
    state = ChatCompletionStreamState()
    reasons: dict[int, Any] = {}
    ids: dict[int, list[int]] = {}
    for event in events_of(data):
        state.handle_chunk(ChatCompletionChunk.model_validate(event, strict=True))
        for choice in event["choices"]:
            ids[choice["index"]] = ids.get(choice["index"], []) + choice.get("token_ids", [])
            if choice["finish_reason"]:
                assert choice["index"] not in reasons
                reasons[choice["index"]] = choice["stop_reason"]
    return state.current_completion_snapshot, reasons, ids


def message_of(choice: Any) -> dict[str, Any]:
    message = choice.message
    return {
        "content": message.content or "",
        "thought": getattr(message, "reasoning_content", None) or "",
        "calls": [
            (call.type, call.function.name, call.function.arguments)
            for call in message.tool_calls or []
        ],
        "finish": choice.finish_reason,
    }


def check_same(client: Client, body: dict[str, Any], step_seeds: tuple[int, int]) -> ChatCompletion:
    """Ask for it whole and as a stream, in other steps; returns the whole."""
    client.model.step_seed = step_seeds[0]
    whole = ChatCompletion.model_validate_json(client.post(CHAT, body), strict=True)
    client.model.step_seed = step_seeds[1]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed, reasons, token_ids = merged(client.post(CHAT, {**body, **options}))
    assert len(whole.choices) == len(streamed.choices) == body.get("n", 1)
    for a, b in zip(whole.choices, streamed.choices, strict=True):
        assert a.index == b.index
        assert message_of(a) == message_of(b)
        assert a.stop_reason == reasons[a.index]  # type: ignore[attr-defined]
        assert (a.model_extra or {}).get("token_ids", []) == token_ids[a.index]
        assert a.logprobs == b.logprobs
        for completion in (a, b):
            ids = [call.id for call in completion.message.tool_calls or []]
            assert len(set(ids)) == len(ids)
    assert whole.usage == streamed.usage
    return whole


HI: list[Any] = [{"role": "user", "content": "hi"}]
CLUSTERS = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family, joined
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # a flag of tags
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",  # two flags of two letters each
    "\U0001f44d\U0001f3fd",
    "\u2764\ufe0f\u200d\U0001f525",
    "\u4f60\u597d\u4e16\u754c",
    "\u3053\u3093\u306b\u3061\u306f",
    "\u1112\u1161\u11ab",  # Hangul in parts
    "e\u0301o\u0302\u0323",
    "\u0915\u094d\u0937\u093f",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0002f81a\uffff\ufffd",
    *["a", "b c", " ", "\n", "\n\n", '"', "\\", "{", "}", "<", "</", "data: ", "\r", "\t"],
]
WORDS = st.sampled_from(CLUSTERS) | st.text(max_size=4)
PROSE = st.lists(WORDS, max_size=8).map("".join)
CALLS = {
    "hermes": '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>',
    "llama": '<|python_tag|>{{"name": "{name}", "parameters": {arguments}}}; ',
    "mistral": "[TOOL_CALLS]{name}[ARGS]{arguments}",
}
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]"]
MARKS.append("[ARGS]")


def parted(text: str) -> list[str]:
    """`text`, its marks apart from the rest."""
    segments = [text]
    for mark in MARKS:
        apart: list[str] = []
        for segment in segments:
            for piece in segment.split(mark):
                apart += [piece, mark]
            apart.pop()
        segments = apart
    return [segment for segment in segments if segment]


VALUES = st.recursive(
    PROSE | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PROSE, inner, max_size=3),
    max_leaves=4,
)
ARGUMENTS = st.builds(
    lambda value, escaped: json.dumps(value, ensure_ascii=escaped),
    st.dictionaries(PROSE, VALUES, max_size=3),
    st.booleans(),
)
SEEDS = st.integers(0, 2**30)


@st.composite
def anything(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    """A template, a reply with whatever in it, and the fields of a request."""
    template = draw(st.sampled_from(sorted(TEMPLATES)))
    call = st.builds(
        lambda form, name, arguments: form.format(name=name, arguments=arguments),
        st.sampled_from(sorted(CALLS.values())),
        st.sampled_from(["get_time", "add", "other"]),
        ARGUMENTS,
    )
    broken = st.builds(lambda text, end: text[:end], call, st.integers(1, 60))
    text = "".join(draw(st.lists(PROSE | st.sampled_from(MARKS) | call | broken, max_size=6)))
    if draw(st.booleans()):
        text = f"<think>{draw(PROSE)}{draw(st.sampled_from(['</think>', '']))}{text}"
    fields: dict[str, Any] = {}
    if template != "plain" and draw(st.booleans()):
        fields |= {"tools": TOOLS, "parallel_tool_calls": draw(st.booleans())}
    if draw(st.booleans()):
        fields["max_tokens"] = draw(st.integers(1, 80))
    if stops := draw(st.lists(stop_in(text) | WORDS.filter(bool), max_size=3)):
        fields |= {"stop": stops, "include_stop_str_in_output": draw(st.booleans())}
    fields["skip_special_tokens"] = draw(st.booleans())
    fields["return_token_ids"] = draw(st.booleans())
    if draw(st.booleans()):
        fields |= {"logprobs": True, "top_logprobs": draw(st.integers(0, 2))}
    fields["n"] = draw(st.integers(1, 3))
    return template, text, fields


def stop_in(text: str) -> st.SearchStrategy[str]:
    """A part of the text, or of a cluster in it."""
    if not text:
        return st.just("x")
    return st.builds(
        lambda at, length: text[at : at + length],
        st.integers(0, len(text) - 1),
        st.integers(1, 5),
    )


def check_anything(
    clients: dict[str, Client],
    case: tuple[str, str, dict[str, Any]],
    token_seed: int,
    step_seeds: tuple[int, int],
) -> None:
    template, text, fields = case
    client = clients[template]
    client.model.say(parted(text), token_seed)
    whole = check_same(client, {"messages": HI, **fields}, step_seeds)
    if "max_tokens" not in fields:  # then how the text was cut into tokens does not show
        assert len({str(message_of(choice)) for choice in whole.choices}) == 1


@settings(max_examples=25, deadline=None)
@given(anything(), SEEDS, st.tuples(SEEDS, SEEDS))
def test_a_stream_joins_to_the_whole_answer(
    clients: dict[str, Client],
    case: tuple[str, str, dict[str, Any]],
    token_seed: int,
    step_seeds: tuple[int, int],
) -> None:
    check_anything(clients, case, token_seed, step_seeds)


@pytest.mark.soak
@settings(max_examples=4000, deadline=None)
@given(anything(), SEEDS, st.tuples(SEEDS, SEEDS))
def test_many_streams_join_to_the_whole_answer(
    clients: dict[str, Client],
    case: tuple[str, str, dict[str, Any]],
    token_seed: int,
    step_seeds: tuple[int, int],
) -> None:
    check_anything(clients, case, token_seed, step_seeds)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 2, 1]])
def test_choices_that_begin_in_any_order_keep_their_index(order: list[int]) -> None:
    request = ChatRequest(model="m", prompt=ChatPrompt(messages=()), sampling=SamplingParams(n=3))
    reply = ChatRenderer("1", "fingerprint", request, ["reasoning_content"])
    readers = [ChoiceReader(None) for _ in order]
    data = b""
    for finish in (Finish.NONE, Finish.STOP):
        for index in order:
            event = Event(uid=index + 7, index=index, deltas=[f"{index}"], finish=finish)
            data += reply.chunk(event, readers[index].read(event))
    streamed, *_ = merged(data + reply.end(None))
    assert [choice.message.content for choice in streamed.choices] == ["00", "11", "22"]
    assert [choice.index for choice in streamed.choices] == [0, 1, 2]


FREE = PROSE.filter(lambda text: not any(c in text for c in "<{[")).map(str.strip)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(CALLS)),
    FREE,
    FREE,
    st.lists(st.tuples(st.sampled_from(["get_time", "add"]), ARGUMENTS), max_size=3),
    SEEDS,
    st.tuples(SEEDS, SEEDS),
)
def test_thought_content_and_calls_are_what_the_model_wrote(
    clients: dict[str, Client],
    template: str,
    thought: str,
    content: str,
    calls: list[tuple[str, str]],
    token_seed: int,
    step_seeds: tuple[int, int],
) -> None:
    thinks = template == "hermes" and bool(thought)
    content = "" if template == "llama" and calls else content
    written = "".join(CALLS[template].format(name=name, arguments=text) for name, text in calls)
    reply = (f"<think>\n{thought}\n</think>\n\n" if thinks else "") + content + written
    client = clients[template]
    client.model.say(parted(reply), token_seed)
    whole = check_same(client, {"messages": HI, "tools": TOOLS, "n": 2}, step_seeds)
    for choice in whole.choices:
        assert message_of(choice) == {
            "content": content,
            "thought": thought if thinks else "",
            "calls": [("function", name, text) for name, text in calls],
            "finish": "tool_calls" if calls else "stop",
        }


@settings(max_examples=25, deadline=None)
@given(st.data(), PROSE, SEEDS, st.tuples(SEEDS, SEEDS))
def test_a_completion_is_cut_at_its_first_stop_streamed_and_whole(
    clients: dict[str, Client],
    data: st.DataObject,
    text: str,
    token_seed: int,
    step_seeds: tuple[int, int],
) -> None:
    client = clients["plain"]
    client.model.say(parted(text), token_seed)
    stop, include = data.draw(stop_in(text)), data.draw(st.booleans())
    body: dict[str, Any] = {"prompt": "x", "n": 2, "stop": stop, "max_tokens": 2000}
    body |= {"include_stop_str_in_output": include, "skip_special_tokens": False}
    client.model.step_seed = step_seeds[0]
    whole = Completion.model_validate_json(client.post(TEXT, body), strict=True)
    found = stop in text
    expected = text[: text.index(stop) + len(stop) * include] if found else text
    assert [choice.text for choice in whole.choices] == [expected] * 2
    client.model.step_seed = step_seeds[1]
    texts = ["", ""]
    for event in events_of(client.post(TEXT, {**body, "stream": True})):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                assert choice["stop_reason"] == (stop if found else None)
    assert texts == [expected] * 2
