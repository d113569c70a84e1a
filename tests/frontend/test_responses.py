"""POST /v1/responses over HTTP, as the `openai` package reads it."""

import asyncio
import functools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from http_server import HttpServer, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from played_model import TEMPLATES, PlayedModel
from scripted_backend import TEXT, WORDS, ScriptedBackend

from minisrv.frontend import responder

PATH = "/v1/responses"
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": name,
        "description": "Tell it.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        "strict": False,
    }
    for name in ("get_time", "add")
]
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "[ARGS]", "[TOOL_CALLS]", "; "]
CALLS = [CALL, CALL[:40], '[TOOL_CALLS]add[ARGS]{"a": 1}', "<|python_tag|>"]
CALLS.append('{"name": "add", "parameters": {"a": "\u4f60\U0001f600"}}')
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
# What differs from one reply to the next.
IDS = {"id", "created_at", "completed_at", "call_id"}


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


def play(server: HttpServer, text: str) -> Any:
    """The back end, which will say `text`."""
    server.backend.text = text  # type: ignore[attr-defined]
    return server.backend


def whole(server: HttpServer, **body: Any) -> Response:
    response = server.http.post(PATH, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    return Response.model_validate_json(response.content, strict=True)


def events(server: HttpServer, **body: Any) -> list[Any]:
    """The events of a stream, each of which has its name twice and its number."""
    response = server.http.post(PATH, json={"input": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, rest = response.content.decode().split("\n\n")
    assert rest == ""
    read = []
    for i, frame in enumerate(frames):
        name, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        assert value["sequence_number"] == i
        read.append(EVENT.validate_python(value, strict=True))
    return read


def plain(value: Any) -> Any:
    """A reply without what differs from one to the next."""
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in IDS}
    return [plain(part) for part in value] if isinstance(value, list) else value


def joined(stream: list[Any]) -> list[dict[str, Any]]:
    """The items of a stream, put together from its deltas alone; checks the order of events."""
    items: list[dict[str, Any]] = []
    kinds = [event.type.removeprefix("response.") for event in stream]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] in ("completed", "incomplete")
    for kind, event in zip(kinds[2:-1], stream[2:-1], strict=True):
        if kind == "output_item.added":
            assert event.output_index == len(items)
            assert not items or items[-1]["status"] == "completed"
            items.append(event.item.model_dump(exclude_unset=True))
            assert items[-1]["status"] == "in_progress"
            continue
        assert event.output_index == len(items) - 1
        if kind == "output_item.done":
            items[-1]["status"] = event.item.status
            assert event.item.model_dump(exclude_unset=True) == items[-1]
            continue
        assert event.item_id == items[-1]["id"]
        add_content(items[-1], kind, event)
    return items


def add_content(item: dict[str, Any], kind: str, event: Any) -> None:
    match kind:
        case "content_part.added":
            assert event.content_index == len(item["content"]) == 0
            item["content"].append(event.part.model_dump(exclude_unset=True))
        case "content_part.done":
            assert event.part.model_dump(exclude_unset=True) == item["content"][0]
        case "function_call_arguments.delta":
            item["arguments"] += event.delta
        case "function_call_arguments.done":
            assert event.arguments == item["arguments"]
        case "output_text.delta" | "reasoning_text.delta":
            item["content"][event.content_index]["text"] += event.delta
        case _:
            assert kind in ("output_text.done", "reasoning_text.done")
            assert event.text == item["content"][event.content_index]["text"]


def shape(items: list[Any]) -> list[Any]:
    """Kind, status, and text or name and arguments of each item."""
    shown: list[Any] = []
    for item in items:
        if item.type == "function_call":
            shown.append((item.type, item.status, item.name, item.arguments))
        else:
            shown.append((item.type, item.status, item.content[0].text))
    return shown


def test_a_text_is_answered(server: HttpServer) -> None:
    response = server.openai.responses.create(model="org/tiny", input="hi")
    assert response.output_text == TEXT
    assert response.status == "completed"
    assert response.id.startswith("resp_")
    assert response.usage is not None
    assert response.usage.model_dump() == {
        "input_tokens": 7,
        "input_tokens_details": {
            "cached_tokens": 3,
            "cache_write_tokens": 0,
            "cache_write_tokens_details": None,
        },
        "output_tokens": len(WORDS) + 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7 + len(WORDS) + 1,
    }
    assert whole(server).incomplete_details is None


def test_the_events_of_a_text_come_in_the_order_of_openai(server: HttpServer) -> None:
    stream = events(server)
    assert [event.type.removeprefix("response.") for event in stream] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(WORDS),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    (item,) = joined(stream)
    assert item["content"] == [
        {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    ]
    created, last = stream[0].response, stream[-1].response
    assert (created.status, created.output, created.usage) == ("in_progress", [], None)
    assert (created.id, created.created_at) == (last.id, last.created_at)
    assert plain(last) == plain(whole(server))


def test_the_stream_helper_of_the_client_assembles_a_text(server: HttpServer) -> None:
    with server.openai.responses.stream(model="org/tiny", input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == TEXT
    assert final.status == "completed"


def test_the_async_client_reads_a_stream(server: HttpServer) -> None:
    async def read() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.responses.create(model="org/tiny", input="hi", stream=True)
            return [e.delta async for e in stream if e.type == "response.output_text.delta"]

    assert "".join(asyncio.run(read())) == TEXT


def test_a_reply_at_its_limit_is_incomplete(server: HttpServer) -> None:
    response = whole(server, max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert shape(response.output) == [("message", "incomplete", "".join(WORDS[:2]))]
    stream = events(server, max_output_tokens=2)
    assert stream[-1].type == "response.incomplete"
    assert plain(stream[-1].response) == plain(response)


def test_calls_and_text_are_items_in_the_order_of_the_reply(hermes: HttpServer) -> None:
    play(hermes, f"<think>hm</think>Yes.\n{CALL}\n{CALL} And?")
    call = ("function_call", "completed", "get_time", '{"zone": "UTC"}')
    response = whole(hermes, tools=TOOLS)
    assert shape(response.output) == [
        ("reasoning", "completed", "hm"),
        ("message", "completed", "Yes."),
        *[call] * 2,
        ("message", "completed", "And?"),
    ]
    prefixes = [str(item.id).split("_")[0] for item in response.output]
    assert prefixes == ["rs", "msg", "fc", "fc", "msg"]
    assert len({item.call_id for item in response.output if item.type == "function_call"}) == 2
    assert response.output_text == "Yes.And?"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    stream = events(hermes, tools=TOOLS)
    assert plain(joined(stream)) == plain(response.output)
    assert plain(stream[-1].response) == plain(response)


def test_the_stream_helper_of_the_client_assembles_calls(hermes: HttpServer) -> None:
    play(hermes, CALL)
    with hermes.openai.responses.stream(model="org/tiny", input="hi", tools=TOOLS) as stream:
        pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert len(pieces) > 3
    assert shape(final.output) == [("function_call", "completed", "get_time", "".join(pieces))]


class Zone(pydantic.BaseModel):
    zone: str


def test_parse_reads_a_text_and_the_arguments_of_a_call(hermes: HttpServer) -> None:
    play(hermes, '{"zone": "UTC"}')
    parsed = hermes.openai.responses.parse(model="org/tiny", input="hi", text_format=Zone)
    assert parsed.output_parsed == Zone(zone="UTC")
    grammar = hermes.backend.grammars[-1]  # type: ignore[attr-defined]
    assert json.loads(grammar.text)["properties"].keys() == {"zone"}
    with hermes.openai.responses.stream(model="org/tiny", input="hi", text_format=Zone) as stream:
        assert stream.get_final_response().output_parsed == Zone(zone="UTC")
    play(hermes, CALL)
    tool: Any = openai.pydantic_function_tool(Zone, name="get_time")
    flat = {"type": "function", **tool["function"]}
    (call,) = hermes.openai.responses.parse(model="org/tiny", input="hi", tools=[flat]).output
    assert call.type == "function_call"
    assert call.parsed_arguments is not None


def test_what_was_said_goes_back_as_input(hermes: HttpServer) -> None:
    backend = play(hermes, f"<think>\nhm\n</think>\n\nI look.{CALL}")
    response = hermes.openai.responses.create(model="org/tiny", input="hi", tools=TOOLS)
    said = [item.model_dump(exclude_none=True) for item in response.output]
    output = {"type": "function_call_output", "call_id": said[-1]["call_id"], "output": "12:00"}
    user: Any = {"role": "user", "content": "hi"}
    items: list[Any] = [user, *said, output]
    play(hermes, "Noon.")
    hermes.openai.responses.create(
        model="org/tiny", input=items, tools=TOOLS, instructions="Be brief."
    )
    assert backend.prompts[-1].endswith(
        "<|system|>Be brief.<|user|>hi<|assistant|><think>hm</think>I look. CALL get_time "
        '{"zone": "UTC"}<|tool|>12:00<|assistant|>'
    )


def test_the_template_sees_tools_as_in_a_chat(hermes: HttpServer) -> None:
    backend = play(hermes, "a")
    whole(hermes, tools=TOOLS)
    names = ("name", "description", "parameters", "strict")
    shown = [{"type": "function", "function": {n: tool[n] for n in names}} for tool in TOOLS]
    assert backend.prompts[-1].startswith("<|sys|>\n" + "\n".join(map(json.dumps, shown)))
    whole(hermes, tools=TOOLS, tool_choice="none")
    assert "get_time" not in backend.prompts[-1]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["get_time", "add"]),
        ({"type": "function", "name": "add"}, ["add"]),
        ("auto", []),
    ],
)
def test_a_call_that_must_be_made_is_held_to_by_a_grammar(
    hermes: HttpServer, choice: Any, names: list[str]
) -> None:
    backend = play(hermes, CALL)
    response = whole(hermes, tools=TOOLS, tool_choice=choice)
    assert plain(response)["tool_choice"] == choice
    grammar = backend.grammars[-1]
    text = grammar.text if grammar else ""
    assert [name for name in ("get_time", "add") if name in text] == names


BAD = {"type": "object", "properties": {"b": {"type": "string", "pattern": "("}}}
BAD_TOOL = {"type": "function", "name": "f", "parameters": BAD}
BAD_FORMAT = {"format": {"type": "json_schema", "name": "n", "schema": BAD}}
FORMAT = {"format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": BAD_FORMAT}, "text.format.schema"),
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "text": FORMAT}, "tool_choice"),
        ({"reasoning": {"effort": "none"}, "enable_thinking": True}, "reasoning.effort"),
    ],
)
def test_what_a_chat_would_refuse_is_refused_in_the_names_of_a_response(
    hermes: HttpServer, fields: dict[str, Any], param: str
) -> None:
    response = hermes.http.post(PATH, json={"input": "hi", **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    for name in ("response_format", "reasoning_effort", ".function"):
        assert name not in error["message"]


def test_without_parallel_calls_the_first_ends_the_reply(hermes: HttpServer) -> None:
    play(hermes, f"A{CALL}{CALL} more")
    response = whole(hermes, tools=TOOLS, parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert response.parallel_tool_calls is False
    full = len(hermes.backend.tokenizer.encode(f"A{CALL}"))  # type: ignore[attr-defined]
    fields = {"tools": TOOLS, "parallel_tool_calls": False, "max_output_tokens": full}
    assert whole(hermes, **fields).status == "completed"


def test_a_call_that_is_cut_off_is_incomplete(hermes: HttpServer) -> None:
    play(hermes, CALL)
    full = len(hermes.backend.tokenizer.encode(CALL))  # type: ignore[attr-defined]
    for max_tokens in range(1, full):
        response = whole(hermes, tools=TOOLS, max_output_tokens=max_tokens)
        assert response.status == "incomplete"
        for item in response.output:
            if item.type == "function_call" and item.status == "completed":
                assert item.arguments == '{"zone": "UTC"}'
            else:
                assert item.status == "incomplete"  # type: ignore[union-attr]
    stopped = whole(hermes, tools=TOOLS, stop=["zone"])
    assert stopped.status == "completed"
    assert shape(stopped.output) == [("function_call", "incomplete", "get_time", '{"')]


def test_a_thought_that_is_cut_off_is_all_there_is(hermes: HttpServer) -> None:
    play(hermes, "<think>\nLet me see")
    response = whole(hermes, max_output_tokens=4)
    assert [item.type for item in response.output] == ["reasoning"]
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]


def test_an_empty_reply_is_an_empty_message(hermes: HttpServer) -> None:
    play(hermes, "")
    assert shape(whole(hermes).output) == [("message", "completed", "")]
    assert [item["type"] for item in joined(events(hermes))] == ["message"]


@pytest.mark.parametrize(("effort", "ending"), [("none", "</think>\n\n"), ("high", "<think>\n")])
def test_the_effort_reaches_the_template(hermes: HttpServer, effort: str, ending: str) -> None:
    backend = play(hermes, "a")
    response = whole(hermes, reasoning={"effort": effort, "summary": "auto"})
    assert backend.prompts[-1].endswith(ending)
    assert response.reasoning is not None
    assert (response.reasoning.effort, response.reasoning.summary) == (effort, None)


CHARS = st.sampled_from('ab \n\u4f60\u0301\U0001f600\u200d<>{}[]"')
SEGMENT = st.text(CHARS, max_size=8) | st.text(max_size=4) | st.sampled_from(MARKS + CALLS)
SAID = st.lists(SEGMENT, max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)), SAID, st.booleans(), st.integers(1, 9), st.integers(1, 60)
)
def test_a_stream_joins_to_the_whole_response(
    servers: dict[str, HttpServer],
    template: str,
    said: str,
    thinking: bool,
    batch: int,
    max_tokens: int,
) -> None:
    server = servers[template]
    body: dict[str, Any] = {"max_output_tokens": max_tokens}
    if template != "plain":
        body["tools"] = TOOLS
    play(server, f"<think>{said}</think>{said}" if thinking else said).batch = batch
    response = whole(server, **body)
    stream = events(server, **body)
    assert plain(joined(stream)) == plain(response.output)
    assert plain(stream[-1].response) == plain(response)
    assert all(item.status == "completed" for item in response.output[:-1])  # type: ignore[union-attr]


def test_a_stream_that_breaks_off_ends_with_a_failed_response(server: HttpServer) -> None:
    stream = events(server, input="break")
    assert stream[-1].type == "response.failed"
    failed = stream[-1].response
    assert (failed.status, failed.error.code, failed.error.message) == (
        *("failed", "server_error"),
        "broken",
    )
    deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert deltas == [WORDS[0]]


def test_a_refusal_after_a_ping_is_a_failed_response(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "FIRST_PING_S", 0.0)
    with serve(make_backend=functools.partial(ScriptedBackend, step_s=0.2)) as slow:
        body = {"input": "refuse", "stream": True}
        text = slow.http.post(PATH, json=body).text
    ping, *frames, rest = text.split("\n\n")
    assert (ping, rest) == (": ping", "")
    values = [json.loads(frame.split("data: ")[1]) for frame in frames if "data: " in frame]
    read = [EVENT.validate_python(value, strict=True) for value in values]
    assert [event.type for event in read] == [
        *("response.created", "response.in_progress", "response.failed"),
    ]
    assert (read[-1].response.error.code, read[-1].response.error.param) == (
        *("invalid_prompt", "input"),
    )


def test_a_failure_before_any_output_is_an_error_of_http(server: HttpServer) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            server.openai.responses.create(model="org/tiny", input="refuse", stream=stream)
        assert (raised.value.param, raised.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.InternalServerError):
        server.openai.responses.create(model="org/tiny", input="break")


def test_an_open_response_is_aborted_by_its_id(server: HttpServer) -> None:
    body = {"input": "stall", "stream": True, "request_id": "mine"}
    with server.http.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if "output_text.delta" in line)
        assert server.http.post("/abort_request", json={"rid": "resp_mine"}).json() == {
            "aborted": 1
        }
        last = [line for line in lines if line][-2:]
    assert last[0] == "event: response.failed"


def test_nothing_is_stored(server: HttpServer) -> None:
    response = server.openai.responses.create(model="org/tiny", input="hi", store=True)
    assert response.to_dict()["store"] is False
    calls: list[Any] = [
        server.openai.responses.retrieve,
        server.openai.responses.delete,
        server.openai.responses.cancel,
        server.openai.responses.input_items.list,
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError, match="stores none") as raised:
            list(call(response.id))
        assert raised.value.param == "response_id"
