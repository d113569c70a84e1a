"""The fields of POST /v1/responses: each has its effect or is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, input_token_count_params, response_create_params

from minisrv.frontend.apis.responses.fields import RESPONSE_FIELDS
from minisrv.frontend.apis.responses.route import COUNT_FIELDS
from minisrv.frontend.fields.table import Treatment
from tests.support.http_server import HttpServer, serve
from tests.support.response_wire import (
    CALL_ITEM,
    OUTPUT_ITEM,
    PATH,
    USER,
    error_of,
    last_request,
    post,
)

REJECTED = [n for n, f in RESPONSE_FIELDS.items() if f.treatment is Treatment.REJECTED]
IGNORED = [n for n, f in RESPONSE_FIELDS.items() if f.treatment is Treatment.IGNORED]
FUNCTION: dict[str, Any] = {"type": "function", "name": "f"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def test_every_field_of_the_client_is_in_the_table() -> None:
    created = response_create_params.ResponseCreateParamsBase.__annotations__.keys()
    assert created <= RESPONSE_FIELDS.keys()
    counted = input_token_count_params.InputTokenCountParams.__annotations__.keys()
    assert counted - {"personality"} <= COUNT_FIELDS.keys()


def test_the_page_of_the_api_has_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    section = page.split("\n## The Responses API\n")[1].split("\n## ")[0]
    named = set(re.findall(r"[`\"](\w+)", section))
    assert RESPONSE_FIELDS.keys() - {"model", "rid"} <= named


@pytest.mark.parametrize("name", REJECTED)
def test_an_unsupported_field_is_refused_by_name(server: HttpServer, name: str) -> None:
    error = error_of(post(server, **{name: ["anything", 5]}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_a_null_and_a_neutral_value_never_fail(server: HttpServer) -> None:
    assert post(server, **(dict.fromkeys(RESPONSE_FIELDS) | {"input": "hi"})).status_code == 200
    for name, field in RESPONSE_FIELDS.items():
        for neutral in field.neutral:
            assert post(server, **{name: neutral}).status_code == 200, (name, neutral)


def test_harmless_fields_change_nothing(server: HttpServer) -> None:
    response = post(server, **{name: {"any": [1]} for name in IGNORED})
    assert response.status_code == 200
    assert "x-minisrv-warnings" not in response.headers
    names = ["reasoning.encrypted_content", "web_search_call.action.sources"]
    agent = {"include": names, "text": {"verbosity": "low"}}
    assert post(server, **agent, reasoning={"summary": "auto"}).status_code == 200


def test_an_unknown_field_is_reported(server: HttpServer) -> None:
    response = post(server, made_up=1, text={"extra": 1})
    assert response.headers["x-minisrv-warnings"] == "unknown fields ignored: made_up, text.extra"
    with serve(strict_params=True) as strict:
        assert error_of(post(strict, made_up=1))["param"] == "made_up"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.25),
        ("top_p", 0.5),
        ("top_k", 7),
        ("min_p", 0.125),
        ("seed", 11),
        ("min_tokens", 2),
        ("ignore_eos", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("stop", ("x",)),
        ("stop_token_ids", (5,)),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.25),
    ],
)
def test_sampling_reaches_the_engine(server: HttpServer, name: str, value: Any) -> None:
    assert getattr(last_request(server, **{name: value}).sampling, name) == value


def test_the_other_fields_reach_the_engine(server: HttpServer) -> None:
    request = last_request(server, max_output_tokens=3, logit_bias={"5": 1.5})
    assert request.sampling.max_tokens == 3
    assert [(bias.token_id, bias.value) for bias in request.sampling.logit_bias] == [(5, 1.5)]
    request = last_request(server, chat_template_kwargs={"style": "a"})
    assert request.template_kwargs == {"style": "a"}
    assert last_request(server, cache_salt="mine").cache_salt == "mine"
    assert post(server, rid="mine").json()["id"] == "resp_mine"


@pytest.mark.parametrize(
    ("text_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, SCHEMA),
    ],
)
def test_the_format_of_the_text_becomes_a_grammar(
    server: HttpServer, text_format: dict[str, Any], schema: Any
) -> None:
    grammar = last_request(server, text={"format": text_format}).sampling.grammar
    assert (grammar and json.loads(grammar.text)) == schema


def test_a_reply_repeats_its_request_with_the_values_that_hold(server: HttpServer) -> None:
    body: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "metadata": {"a": "b"},
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True},
            "verbosity": "low",
        },
        "tools": [FUNCTION],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "store": True,
    }
    reply = post(server, **body).json()
    Response.model_validate_json(json.dumps(reply), strict=True)
    tool = {"description": None, "parameters": None, "strict": None, **FUNCTION}
    expected = {**body, "tools": [tool], "top_p": 0.95, "truncation": "disabled"}
    assert {name: reply[name] for name in expected} == expected
    plain = post(server).json()
    assert (plain["temperature"], plain["tool_choice"], plain["tools"]) == (0.6, "auto", [])
    assert plain["text"] == {"format": {"type": "text"}, "verbosity": None}


UNSUPPORTED_CODE = "unsupported_parameter"


def content(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", None),
        ({"input": []}, "input", None),
        ({"input": 5}, "input", None),
        ({"input": ["hi"]}, "input.0", None),
        ({"input": [{"content": "hi"}]}, "input.0.type", None),
        ({"input": [{"role": "tool", "content": "hi"}]}, "input.0.role", None),
        ({"input": [USER, {"role": "user"}]}, "input.1.content", None),
        ({"input": content("hi")}, "input.0.content.0", None),
        ({"input": content({"type": "input_text"})}, "input.0.content.0.text", None),
        *(
            (
                {"input": content({"type": "input_text", "text": "a"}, {"type": kind})},
                "input.0.content.1.type",
                UNSUPPORTED_CODE,
            )
            for kind in ("input_image", "input_file", "input_audio", 5)
        ),
        (
            {"input": [{**OUTPUT_ITEM, "output": [{"type": "image"}]}]},
            "input.0.output.0.type",
            UNSUPPORTED_CODE,
        ),
        ({"input": [{**OUTPUT_ITEM, "output": None}]}, "input.0.output", None),
        ({"input": [{**OUTPUT_ITEM, "call_id": None}]}, "input.0.call_id", None),
        ({"input": [{**CALL_ITEM, "arguments": {}}]}, "input.0.arguments", None),
        ({"input": [{**CALL_ITEM, "name": None}]}, "input.0.name", None),
        (
            {"input": [{"type": "reasoning", "content": [{"type": "x"}]}]},
            "input.0.content.0.type",
            UNSUPPORTED_CODE,
        ),
        *(
            ({"input": [USER, {"type": kind}]}, "input.1.type", UNSUPPORTED_CODE)
            for kind in ("item_reference", "compaction", "made_up")
        ),
        ({"instructions": ["a"]}, "instructions", None),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"max_output_tokens": "5"}, "max_output_tokens", None),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", None),
        ({"temperature": 3}, "temperature", None),
        ({"top_p": 0}, "top_p", None),
        ({"stop_token_ids": [1000]}, "stop_token_ids", None),
        ({"metadata": {"a": 1}}, "metadata.a", None),
        ({"metadata": []}, "metadata", None),
        ({"include": ["message.output_text.logprobs"]}, "include.0", UNSUPPORTED_CODE),
        ({"include": ["reasoning.encrypted_content", "x"]}, "include.1", UNSUPPORTED_CODE),
        ({"include": [5]}, "include.0", None),
        ({"top_logprobs": 1}, "top_logprobs", UNSUPPORTED_CODE),
        ({"truncation": "auto"}, "truncation", UNSUPPORTED_CODE),
        ({"background": True}, "background", UNSUPPORTED_CODE),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", None),
        ({"text": {"format": {}}}, "text.format.type", None),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", None),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", None),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", None),
        ({"text": {"verbosity": "huge"}}, "text.verbosity", None),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", None),
        ({"tools": [{}]}, "tools.0.type", None),
        ({"tools": [{"type": "function"}]}, "tools.0.name", None),
        ({"tools": [{**FUNCTION, "name": "a b"}]}, "tools.0.name", None),
        ({"tools": [{**FUNCTION, "parameters": 5}]}, "tools.0.parameters", None),
        ({"tools": [FUNCTION, FUNCTION]}, "tools.1.name", None),
        ({"tools": [FUNCTION]}, "tools", UNSUPPORTED_CODE),
        ({"tools": [{"type": "custom"}]}, "tools.0.name", None),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools.0.tools", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", None),
    ],
)
def test_a_wrong_field_is_named(
    server: HttpServer, fields: dict[str, Any], param: str, code: str | None
) -> None:
    error = error_of(post(server, **fields))
    assert (error["param"], error["code"]) == (param, code)
    for name in (
        "max_tokens",
        "max_completion_tokens",
        "response_format",
        "reasoning_effort",
        ".function",
    ):
        assert name not in error["message"]


def test_a_refused_type_is_reported(server: HttpServer) -> None:
    assert 'type is "mcp"' in error_of(post(server, input=content({"type": "mcp"})))["message"]


def test_an_unknown_model_is_404(server: HttpServer) -> None:
    with pytest.raises(openai.NotFoundError, match="org/tiny"):
        server.openai.responses.create(model="gpt-4", input="hi")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["hi", "user", "function", "message", "input_text", "reasoning", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "output", "format"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted(RESPONSE_FIELDS)) | st.text(max_size=6)


@given(body=VALUES | st.dictionaries(NAMES, VALUES, max_size=5), good=st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_json_gets_a_2xx_or_a_4xx(server: HttpServer, body: Any, good: bool) -> None:
    if isinstance(body, dict) and good:
        body = {"input": "hi", **body}
    headers = {"Content-Type": "application/json"}
    response = server.http.post(PATH, content=json.dumps(body), headers=headers)
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
