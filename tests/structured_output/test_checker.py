"""A grammar that cannot be used is refused with a sentence that says where."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.sampling_params import MAX_GRAMMAR_BYTES, Grammar
from minisrv.structured_output.checker import GrammarChecker
from tests.support.builders import demo_vocabulary


@pytest.fixture(scope="module")
def checker() -> GrammarChecker:
    return GrammarChecker(demo_vocabulary())


def refusal(checker: GrammarChecker, grammar: Grammar) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        checker.check(grammar)
    assert caught.value.param == grammar.param
    return caught.value.message


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
        (an_object(a={"type": "string", "format": "zzz"}), "/properties/a", "Unknown format: zzz"),
        (an_object(**{"a/b~": {"type": "foo"}}), "/properties/a~1b~0", "Invalid type"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "", "oneOf"),
        ({"$ref": "https://example.com/schema.json"}, "", "not present"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "", '"not"'),
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_is_refused_with_the_path_to_what_is_wrong(
    checker: GrammarChecker, schema: Any, place: str, reason: str
) -> None:
    message = refusal(checker, Grammar.json_schema(schema, "where"))
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
        (Grammar.json_schema({"type": "number", "multipleOf": 1234.567}), "multipleOf of 1234.567"),
        (Grammar.lark('start: %json {"multiple\\u004ff": 1000003}'), "multipleOf of 1000003"),
    ],
    ids=str,
)
def test_other_grammars_are_refused_with_what_is_wrong(
    checker: GrammarChecker, grammar: Grammar, reason: str
) -> None:
    assert reason in refusal(checker, grammar)


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
def test_good_grammars_pass_and_are_remembered(checker: GrammarChecker, grammar: Grammar) -> None:
    checker.check(grammar)
    assert (grammar.kind, grammar.text, grammar.before) in checker._good
    checker.check(grammar)


def test_a_text_over_the_limit_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="the limit is 131072"):
        Grammar.regex("a" * (MAX_GRAMMAR_BYTES + 1))


def test_the_worst_within_the_limits_is_refused_or_accepted_soon(checker: GrammarChecker) -> None:
    tags = [[an_object(**{f"a{i}_{j}": {}}) for j in range(8)] for i in range(6)]
    hostile = [
        {"allOf": [{"anyOf": options} for options in tags]},
        {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]},
        {"enum": [f"{i * 7919 % 100003}" for i in range(13_000)]},
    ]
    for schema in hostile:
        start = time.perf_counter()
        with contextlib.suppress(InvalidRequestError):
            checker.check(Grammar.json_schema(json.dumps(schema)))
        assert time.perf_counter() - start < 5


def test_a_model_without_a_vocabulary_says_why() -> None:
    message = refusal(GrammarChecker(MinisrvError("no such tokens")), Grammar.regex("a"))
    assert message == "grammar is not supported with this model: no such tokens"
