"""A grammar that cannot be used is refused with a sentence that says where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import MAX_GRAMMAR_BYTES, Grammar
from minisrv.structured_output.checker import find_error
from minisrv.structured_output.vocabulary import Vocabulary
from tests.support.builders import demo_vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return demo_vocabulary()


def refusal(vocabulary: Vocabulary, grammar: Grammar) -> str:
    error = find_error(grammar, vocabulary)
    assert error is not None
    assert error.param == grammar.param
    return error.message


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"type": "foo"}, "", "Invalid type: foo"),
        (an_object(a={"type": "foo"}), "/properties/a", "Invalid type"),
        (
            an_object(a={"type": "array", "items": an_object(b={"not": {"type": "string"}})}),
            "/properties/a/items/properties/b",
            '"not"',
        ),
        ({"$defs": {"x": {"type": "foo"}}, "$ref": "#/$defs/x"}, "/$defs/x", "Invalid type"),
        (
            {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "a(b"}]},
            "/anyOf/1",
            "regex, at character 1: unclosed group",
        ),
        (an_object(a={"type": "string", "format": 3}), "/properties/a", "format is 3; it must be"),
        (an_object(**{"a/b~": {"type": "foo"}}), "/properties/a~1b~0", "Invalid type"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "", "oneOf"),
        ({"$ref": "https://example.com/schema.json"}, "", "is not within the schema"),
        ({"x-guidance": {"lenient": True}, "not": {"type": "null"}}, "", '"not"'),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_is_refused_with_the_path_to_what_is_wrong(
    vocabulary: Vocabulary, schema: Any, place: str, reason: str
) -> None:
    message = refusal(vocabulary, Grammar.json_schema(schema, "where"))
    assert message.startswith(f"where cannot be used at {place}: " if place else "where cannot be")
    assert reason in message


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("a(b"), "at character 1: unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.lark('start: "a" nothing'), "nothing"),
        (Grammar.lark("root ::= nothing"), "nothing"),
        (Grammar.choice([]), "array of 1 to"),
        (Grammar.choice(["a", ""]), "non-empty strings"),
        (Grammar.json_schema("{"), "is not valid JSON"),
        (Grammar.json_schema(False), "allows no text"),
        (Grammar.json_schema("[1]"), "must be a JSON schema"),
        (Grammar.json_schema('{"items":' * 400 + "{}" + "}" * 400), "nested too deeply"),
        (Grammar(kind="xml", text=""), "unknown kind of grammar"),
        (Grammar.json_schema({"type": "integer", "multipleOf": 999_983}), "multipleOf of 999983"),
        (Grammar.json_schema('{"multipleOf": 1' + "0" * 5000 + "}"), "multipleOf of 1000"),
        (Grammar.json_schema({"type": "number", "multipleOf": 1234.567}), "multipleOf of 1234.567"),
        (Grammar.lark('start: %json {"multiple\\u004ff": 1000003}'), "multipleOf of 1000003"),
    ],
    ids=str,
)
def test_other_grammars_are_refused_with_what_is_wrong(
    vocabulary: Vocabulary, grammar: Grammar, reason: str
) -> None:
    assert reason in refusal(vocabulary, grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.json_schema(True),
        Grammar.json_object(),
        Grammar.regex(r"^\d{3}$"),
        Grammar.choice(["a", 'q"', "\\", "\n", "日本"]),
        Grammar.lark('start: "a" b\nb: /x+/'),
        Grammar.lark('root ::= "a" [0-9]+ | "b"'),
        Grammar.lark('start: "<" %json {"type": "integer"} ">"'),
        Grammar.json_schema({"type": "number", "multipleOf": 0.01}),
    ],
    ids=str,
)
def test_good_grammars_pass(vocabulary: Vocabulary, grammar: Grammar) -> None:
    assert find_error(grammar, vocabulary) is None


def test_the_part_that_is_wrong_is_named(vocabulary: Vocabulary) -> None:
    parts = (Grammar.regex("a", "first"), Grammar.regex("a(b", "second"))
    whole = replace(Grammar.lark("start: /a(b/", "whole"), parts=parts)
    error = find_error(whole, vocabulary)
    assert error is not None
    assert error.param == "second"


def test_a_text_over_the_limit_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="the limit is 131072"):
        Grammar.regex("a" * (MAX_GRAMMAR_BYTES + 1))


@pytest.mark.parametrize("make", [Grammar.regex, Grammar.lark, Grammar.json_schema])
def test_a_lone_surrogate_is_refused_with_its_place(make: Any) -> None:
    with pytest.raises(InvalidRequestError, match="has a lone surrogate at character 1") as caught:
        make("a\ud800", "guided_regex")
    assert caught.value.param == "guided_regex"


def test_a_choice_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="lone surrogate"):
        Grammar.choice(["a", "\udc00"])
