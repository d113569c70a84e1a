"""Grammars of arguments between tags: which values they take, and that these are read as such."""

import json
from typing import Any

import pytest

from minisrv.frontend.tool_calls.formats import CallReading
from minisrv.frontend.tool_calls.pieces import ToolCallArguments
from minisrv.structured_output.checker import find_error
from tests.tokenizer.test_reply_grammar import Replies, write_tags

FORMS = ("qwen3_coder", "glm", "glm without tokens")
STRING = {"type": "string"}
SCHEMA: dict[str, Any] = {
    "properties": {
        "text": STRING,
        "short": {**STRING, "maxLength": 3, "minLength": 1},
        "code": {**STRING, "pattern": "^[a-z]+/[0-9]{2}$"},
        "part": {**STRING, "pattern": "b/c"},
        "color": {"enum": ["red", "dark blue", 7, None]},
        "kind": {"const": "k"},
        "count": {"$ref": "#/$defs/count"},
        "list": {"type": "array", "items": {"$ref": "#/$defs/count"}},
        "any": {},
        "maybe": {"anyOf": [STRING, {"type": "null"}]},
    },
    "$defs": {"count": {"type": "integer", "minimum": 0}},
}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def replies(form: str) -> Replies:
    return Replies(form)


def takes(replies: Replies, form: str, schema: Any, arguments: dict[str, Any]) -> bool:
    function = {"name": "f", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    grammar = replies.grammars.calls(tools, ("f",), parallel=False)
    try:
        return replies.takes(grammar, write_tags(form, "f", arguments))
    except AssertionError:
        return False


def read(replies: Replies, form: str, schema: Any, arguments: dict[str, Any]) -> Any:
    tool_format = replies.chat_format.tool_format
    assert tool_format is not None
    parser = CallReading(tool_format=tool_format, schemas={"f": schema}).make_parser()
    pieces = parser.push(write_tags(form, "f", arguments)) + parser.flush()
    return json.loads("".join(p.text for p in pieces if isinstance(p, ToolCallArguments)))


GOOD: list[dict[str, Any]] = [
    {},
    {"text": ""},
    {"text": "a\n<b> \u4f60 </ parameter>\n"},
    {"short": "abc"},
    {"code": "ab/12"},
    {"part": "ab/cd"},
    {"color": "dark blue"},
    {"color": 7},
    {"color": None},
    {"kind": "k", "count": 5},
    {"list": [1, 22]},
    {"any": [1, {"a": None}]},
    {"any": "text"},
    {"maybe": "x"},
    {"maybe": None},
    {"text": "x", "count": 1, "maybe": "y"},
]


@pytest.mark.parametrize("arguments", GOOD, ids=str)
def test_arguments_under_the_schema_are_taken_and_read_back(
    replies: Replies, form: str, arguments: dict[str, Any]
) -> None:
    assert takes(replies, form, SCHEMA, arguments)
    assert read(replies, form, SCHEMA, arguments) == arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"short": "abcd"},
        {"short": ""},
        {"code": "ab/1"},
        {"code": "xab/12y"},
        {"part": "bc"},
        {"color": "blue"},
        {"kind": "kk"},
        {"count": -1},
        {"count": "many"},
        {"list": [1, -2]},
        {"list": [1, "a"]},
        {"other": "x"},
        {"count": 1, "text": "in the wrong order"},
    ],
    ids=str,
)
def test_other_arguments_are_refused(
    replies: Replies, form: str, arguments: dict[str, Any]
) -> None:
    assert not takes(replies, form, SCHEMA, arguments)


def test_what_is_required_must_be_there(replies: Replies, form: str) -> None:
    schema = {**SCHEMA, "required": ["text", "count"]}
    assert takes(replies, form, schema, {"text": "a", "count": 1})
    assert takes(replies, form, schema, {"text": "a", "kind": "k", "count": 1})
    assert not takes(replies, form, schema, {"text": "a"})


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({}, {"a": "x", "b": 5}, None),
        ({"additionalProperties": False}, {}, {"a": 1}),
        ({"additionalProperties": {"type": "integer"}}, {"a": 1, "b": 2}, {"a": "x"}),
        ({"properties": {"a": STRING}}, {"a": "x"}, {"b": "x"}),
        ({"properties": {"a": STRING}, "additionalProperties": STRING}, {"a": "5", "c": "6"}, None),
    ],
    ids=str,
)
def test_free_keys_are_taken_where_the_schema_has_no_others_or_says_what_they_hold(
    replies: Replies, form: str, schema: Any, good: dict[str, Any], bad: dict[str, Any] | None
) -> None:
    assert takes(replies, form, schema, good)
    assert read(replies, form, schema, good) == good
    if bad is not None:
        assert not takes(replies, form, schema, bad)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": [], "required": "a"},
        {"properties": {"a": {"enum": 5, "type": {"x": 1}, "anyOf": {}}}},
        {"properties": {"a": {"$ref": "#/properties/a"}, "b": {"$ref": "http://x"}}},
        {"properties": {"a": {**STRING, "pattern": "^(a|b$)|c", "minLength": 2.0}}},
        {"properties": {"a": {**STRING, "pattern": 5, "maxLength": "x"}}},
        {"properties": {"a": {**STRING, "pattern": "("}}},
        {"properties": {"a": {"allOf": [{"anyOf": [{"$ref": "#"}]}, {"type": "null"}]}}},
        {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": STRING}}}},
    ],
    ids=str,
)
def test_a_strange_schema_gives_a_grammar_or_a_refusal(
    replies: Replies, form: str, schema: Any
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    grammar = replies.grammars.calls(tools, ("f",), parallel=False)
    find_error(grammar, replies.vocabulary)
    assert read(replies, form, schema, {"a": "x"}) == {"a": "x"}
