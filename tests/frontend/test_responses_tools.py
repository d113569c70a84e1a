"""Tools as coding agents send them: namespaces, custom tools, and tools of OpenAI's own server."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.frontend.apis.responses.custom_input import CustomInput
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.response_wire import USER, error_of, events, joined, plain, play, post, whole

PATCH = '*** Begin Patch\n+\ta = "\u4f60\U0001f600"\n*** End Patch'
PLAIN = {"type": "function", "name": "get_time", "parameters": {"type": "object"}}
BAD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
NAMESPACE = {
    "type": "namespace",
    "name": "agents",
    "description": "Sub-agents.",
    "tools": [
        {"type": "function", "name": "spawn", "description": "Begin one.", "parameters": {}},
        {"type": "function", "name": "get_time"},
    ],
}
CUSTOM = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "***" /.+/'},
}
HOSTED = [{"type": kind} for kind in ("web_search", "local_shell", "image_generation")]
TOOLS: list[Any] = [HOSTED[0], NAMESPACE, PLAIN, *HOSTED[1:], CUSTOM]


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    make = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=make) as running:
        yield running


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def shown_tools(server: HttpServer) -> dict[str, Any]:
    """What the template sees of the tools, by name."""
    prompt = server.backend.prompts[-1]  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in prompt.splitlines() if line.startswith("{")]
    return {line["function"]["name"]: line["function"] for line in lines}


def test_the_model_sees_functions_namespaces_and_custom_tools(hermes: HttpServer) -> None:
    play(hermes, "a")
    response = post(hermes, tools=TOOLS)
    assert response.headers["x-minisrv-warnings"] == (
        "tools left out, which this server cannot run: web_search, local_shell, image_generation; "
        "tools.5.format is shown to the model, but not enforced"
    )
    tools = shown_tools(hermes)
    assert list(tools) == ["agents__spawn", "agents__get_time", "get_time", "apply_patch"]
    assert tools["agents__spawn"]["description"] == "agents: Sub-agents.\n\nBegin one."
    parameters = tools["apply_patch"]["parameters"]
    assert parameters["required"] == ["input"]
    assert CUSTOM["format"]["definition"] in parameters["properties"]["input"]["description"]  # type: ignore[index]


def test_calls_return_under_the_names_of_the_client(hermes: HttpServer) -> None:
    arguments = json.dumps({"input": PATCH})
    calls = [
        call("agents__get_time", "{}"),
        call("get_time", "{}"),
        call("spawn", '{"a": 1}'),  # without its namespace, which is clear here
        call("apply_patch", arguments),
        call("made_up", "{}"),
    ]
    play(hermes, "\n".join(calls))
    response = whole(hermes, tools=TOOLS)
    assert [
        (item.type, getattr(item, "namespace", None), item.name)  # type: ignore[union-attr]
        for item in response.output
    ] == [
        ("function_call", "agents", "get_time"),
        ("function_call", None, "get_time"),
        ("function_call", "agents", "spawn"),
        ("custom_tool_call", None, "apply_patch"),
        ("function_call", None, "made_up"),
    ]
    assert response.output[3].input == PATCH  # type: ignore[union-attr]
    stream = events(hermes, tools=TOOLS)
    assert plain(joined(stream)) == plain(response.output)
    assert plain(stream[-1].response) == plain(response)
    deltas = [e for e in stream if e.type == "response.custom_tool_call_input.delta"]
    assert len(deltas) > 3


def test_calls_and_outputs_go_back_as_the_model_wrote_them(hermes: HttpServer) -> None:
    play(hermes, call("agents__spawn", '{"a": 1}') + call("apply_patch", '{"input": "b"}'))
    first = hermes.openai.responses.create(model="org/tiny", input="hi", tools=TOOLS)
    said = [item.model_dump(exclude_none=True) for item in first.output]
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    outputs = [
        {"type": "function_call_output", "call_id": said[0]["call_id"], "output": [image]},
        {"type": "custom_tool_call_output", "call_id": said[1]["call_id"], "output": "Done."},
    ]
    searched = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    items = [USER, searched, *said, *outputs]
    response = post(hermes, input=items, tools=TOOLS)
    assert response.headers["x-minisrv-warnings"].startswith(
        "tools left out, which this server cannot run: web_search, local_shell, image_generation; "
        "items left out, which this server cannot read: web_search_call, input_image; "
    )
    assert hermes.backend.prompts[-1].endswith(  # type: ignore[attr-defined]
        '<|user|>hi<|assistant|> CALL agents__spawn {"a": 1} CALL apply_patch {"input": "b"}'
        "<|tool|>[image left out: this model reads only text]<|tool|>Done.<|assistant|>"
    )


def test_items_may_add_tools(hermes: HttpServer) -> None:
    play(hermes, "a")
    added = {"type": "additional_tools", "role": "developer", "tools": [PLAIN, HOSTED[0]]}
    assert post(hermes, input=[added, USER], tools=[CUSTOM]).status_code == 200
    assert list(shown_tools(hermes)) == ["apply_patch", "get_time"]
    error = error_of(post(hermes, input=[USER, {**added, "tools": [{**PLAIN, "name": 5}]}]))
    assert error["param"] == "input.1.tools.0.name"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "function", "namespace": "agents", "name": "get_time"}, ["agents__get_time"]),
        ({"type": "function", "name": "get_time"}, ["get_time"]),
        ({"type": "function", "name": "spawn"}, ["agents__spawn"]),
        ({"type": "custom", "name": "apply_patch"}, ["apply_patch"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "spawn"}, CUSTOM, HOSTED[0]],
            },
            ["agents__spawn", "apply_patch"],
        ),
    ],
)
def test_a_choice_names_tools_as_the_client_does(
    hermes: HttpServer, choice: dict[str, Any], names: list[str]
) -> None:
    backend = play(hermes, call(names[0], '{"input": "a"}'))
    assert post(hermes, tools=TOOLS, tool_choice=choice).status_code == 200
    grammar = backend.grammars[-1].text.replace("\\", "")
    every = ["agents__spawn", "agents__get_time", "get_time", "apply_patch"]
    assert [name for name in every if f'"{name}"' in grammar] == names


def test_allowed_tools_are_the_only_ones_shown(hermes: HttpServer) -> None:
    play(hermes, "a")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [PLAIN]}
    assert post(hermes, tools=TOOLS, tool_choice=allowed).json()["tool_choice"] == allowed
    assert list(shown_tools(hermes)) == ["get_time"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": HOSTED[0]}, "tool_choice.type"),
        ({"tools": HOSTED, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "name": "x"}}, "tool_choice.name"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "x"}],
                },
            },
            "tool_choice.tools.0.name",
        ),
        ({"tools": [HOSTED[0], NAMESPACE, NAMESPACE]}, "tools.2.tools.0.name"),
        ({"tools": [{**NAMESPACE, "name": "a b"}]}, "tools.0.tools.0.name"),
        ({"tools": [{**CUSTOM, "format": {"type": "grammar"}}]}, "tools.0.format.syntax"),
        (
            {
                "tools": [HOSTED[0], {**NAMESPACE, "tools": [{**PLAIN, "parameters": BAD}]}],
                "tool_choice": "required",
            },
            "tools.1.tools.0.parameters",
        ),
    ],
)
def test_an_error_names_the_tool_where_the_client_put_it(
    hermes: HttpServer, fields: dict[str, Any], param: str
) -> None:
    assert error_of(post(hermes, **fields))["param"] == param


def test_strict_parameters_refuse_what_would_be_left_out() -> None:
    make = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    image = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}
    with serve(make_backend=make, strict_params=True) as strict:
        assert error_of(post(strict, tools=[PLAIN, HOSTED[0]]))["param"] == "tools.1.type"
        for item, param in (({"type": "mcp_call"}, "type"), (image, "output.0.type")):
            assert error_of(post(strict, input=[USER, item]))["param"] == f"input.1.{param}"


def read(arguments: str, size: int) -> str:
    """The input that `arguments` hold, which arrive in pieces of `size` characters."""
    custom = CustomInput()
    pieces = [arguments[at : at + size] for at in range(0, len(arguments), size)]
    return "".join([*map(custom.push, pieces), custom.flush()])


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text('\\"u\nd8{}\U0001f600')


@given(text=TEXT, size=st.integers(1, 7), ascii_only=st.booleans())
def test_the_text_of_a_custom_call_is_read_from_any_pieces(
    text: str, size: int, ascii_only: bool
) -> None:
    assert read(json.dumps({"input": text}, ensure_ascii=ascii_only), size) == text
    assert read(json.dumps({"patch": text}, ensure_ascii=ascii_only), size) == text


@given(text=st.text('\\"u\nd8ac0{}: '), size=st.integers(1, 7))
def test_what_is_not_json_is_read_alike_from_any_pieces(text: str, size: int) -> None:
    for arguments in (text, '{"input": "' + text):
        assert read(arguments, size) == read(arguments, 1000)
        read(arguments, size).encode()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a\nb"}', "a\nb"),  # a line break that should have been escaped
        (r'{"input": "a\d"}', r"a\d"),
        (r'{"input": "\ud83d"}', "\ufffd"),
        ('{"input": "cut', "cut"),
        ('{"a": "b", "c": "d"}', '{"a": "b", "c": "d"}'),
        ('{"input": 5}', '{"input": 5}'),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_what_a_model_writes_instead_of_json_is_kept(arguments: str, text: str) -> None:
    assert read(arguments, 3) == text
