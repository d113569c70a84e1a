"""Thoughts, texts and calls of a response: items, whole and streamed."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.response_wire import CALL, PATH, TOOLS, events, joined, plain, play, shape, whole

MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "\n", "[ARGS]", "[TOOL_CALLS]", "; "]
CALLS = [CALL, CALL[:40], '[TOOL_CALLS]add[ARGS]{"a": 1}', "<|python_tag|>"]
CALLS.append('{"name": "add", "parameters": {"a": "\u4f60\U0001f600"}}')


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
        ({"tools": [BAD_TOOL], "tool_choice": "required"}, "tools.0.parameters"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
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


def test_the_schema_of_a_required_call_replaces_the_format(hermes: HttpServer) -> None:
    backend = play(hermes, CALL)
    fields = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_time"}}
    response = hermes.http.post(PATH, json={"input": "hi", "text": FORMAT, **fields})
    assert response.headers["x-minisrv-warnings"] == (
        "text.format has no effect: tool_choice requires a call"
    )
    assert "get_time" in backend.grammars[-1].text
    (call,) = response.json()["output"]
    assert call["name"] == "get_time"


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


@settings(max_examples=60, deadline=None)
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
