"""Schemas as generators write them are accepted, and every text under them is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from random import Random
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from jsonschema import Draft202012Validator
from pydantic import Base64Bytes, BaseModel, Field, SecretStr

from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.checker import find_error
from minisrv.structured_output.json_schema import MAX_INTEGER, MAX_LENGTH, MAX_NUMBER, simplify
from minisrv.structured_output.source import to_source
from minisrv.structured_output.vocabulary import Vocabulary
from tests.support.builders import demo_tokenizer, demo_vocabulary

STRING = {"type": "string"}
INT64 = {"minimum": -(2**63), "maximum": 2**63 - 1}
LONG = {"minimum": -9.2233720368547758e18, "maximum": 9.2233720368547758e18}
FLOAT32 = {"minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38}
DOUBLE = {"minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return demo_vocabulary()


def accepts(vocabulary: Vocabulary, grammar: Grammar | dict[str, Any], text: str) -> bool:
    if isinstance(grammar, dict):
        grammar = Grammar.json_schema(grammar)
    matcher = vocabulary.compile(to_source(grammar))
    for token_id in demo_tokenizer().encode(text, add_special_tokens=False):
        matcher.advance(token_id)
    return matcher.accepts


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({**STRING, "format": "path"}, '"a"', "1"),
        ({**STRING, "format": "password"}, '"a"', "1"),
        ({**STRING, "format": "binary"}, '"a"', "1"),
        ({**STRING, "format": "byte"}, '"a"', "1"),
        ({**STRING, "format": "url"}, '"a"', "1"),
        ({**STRING, "format": ""}, '"a"', "1"),
        ({**STRING, "format": "unknown"}, '"a"', "1"),
        ({**STRING, "format": "uuid"}, '"0123abcd-0123-0123-0123-0123456789ab"', '"a"'),
        ({"type": "array", "items": STRING, "uniqueItems": False}, '["a", "a"]', "[1]"),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, "[1]", "[1,1]"),
        ({"type": "object", "propertyNames": STRING}, '{"a": 1}', "[]"),
        ({"type": "object", "propertyNames": {"format": "uuid"}}, '{"a": 1}', "[]"),
        ({"type": "object", "propertyNames": {"minLength": 0, "title": "Key"}}, '{"a": 1}', "[]"),
        ({"type": "object", "propertyNames": {"enum": ["a", "b"]}}, '{"b": 1}', '{"c": 1}'),
        (
            {
                "properties": {"a": {"type": "integer"}, "c": STRING},
                "propertyNames": {"type": "string", "enum": ["a", "b"]},
                "additionalProperties": {"type": "boolean"},
                "type": "object",
            },
            '{"a": 1, "b": true}',
            '{"c": "x"}',
        ),
        ({"type": "object", "propertyNames": {"const": "a"}}, '{"a": 1}', '{"b": 1}'),
        ({"$schema": "http://json-schema.org/schema#", **STRING}, '"a"', "1"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", **STRING}, '"a"', "1"),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema#", **STRING}, '"a"', "1"),
        ({"$schema": "https://spec.openapis.org/oas/3.1/dialect/base", **STRING}, '"a"', "1"),
        ({"items": [STRING], "additionalItems": {"not": {}}, "type": "array"}, '["a"]', '["a", 1]'),
        ({"type": "object", "additionalProperties": {"not": {}}}, "{}", '{"a": 1}'),
        ({"anyOf": [{"not": {}}, STRING]}, '"a"', "1"),
        ({**STRING, "not": False}, '"a"', "1"),
        ({**STRING, "then": {"maxLength": 0}}, '"a"', "1"),
        ({**STRING, "if": {"maxLength": 0}, "else": True}, '"a"', "1"),
        ({"type": "array", "contains": STRING, "minContains": 0}, "[1]", "1"),
        ({"type": "array", "minContains": 2}, "[]", "1"),
        ({"type": "object", "dependentRequired": {"a": []}, "dependentSchemas": {}}, "{}", "1"),
        ({"type": "object", "unevaluatedProperties": {}}, '{"a": 1}', "1"),
        ({"type": "object", "unevaluatedProperties": False}, "{}", '{"a": 1}'),
        (
            {"type": "array", "prefixItems": [STRING], "unevaluatedItems": False},
            '["a"]',
            '["a", 1]',
        ),
        ({**STRING, "minLength": 0.0, "maxLength": 2.0}, '"ab"', '"abc"'),
        ({**STRING, "maxLength": 2**63 - 1, "minLength": 1}, '"ab"', '""'),
        ({"type": "array", "maxItems": 2**64 - 1}, "[1]", "1"),
        ({"type": "object", "minProperties": 0, "properties": {"a": {}}}, "{}", "1"),
        ({"$dynamicAnchor": "x", **STRING}, '"a"', "1"),
        ({"$ref": "#/components/p", "components": {"p": {"format": "zzz", **STRING}}}, '"a"', "1"),
        ({**STRING, "default": float("nan"), "examples": [1e999]}, '"a"', "1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_allows_everything_is_an_annotation(
    vocabulary: Vocabulary, schema: dict[str, Any], good: str, bad: str
) -> None:
    grammar = Grammar.json_schema(json.dumps(schema).replace("NaN", "0").replace("Infinity", "0"))
    assert find_error(grammar, vocabulary) is None
    assert accepts(vocabulary, grammar, good)
    assert not accepts(vocabulary, grammar, bad)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", **INT64}, [MAX_INTEGER, -MAX_NUMBER, 0], [2**63, -(2**63) - 1]),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [0, 2**62], [-1, 2**64]),
        ({"type": "integer", "exclusiveMaximum": 2**63}, [MAX_INTEGER, -(10**30)], [2**63]),
        ({"type": "integer", "exclusiveMaximum": 2**63 - 1}, [2**62], [MAX_INTEGER]),
        ({"type": "integer", "minimum": 10**18}, [10**18, 2**62], [10**18 - 1, 10**19]),
        ({"type": "integer", "maximum": -(10**18)}, [-(10**18), -(2**62)], [1 - 10**18]),
        ({"type": "number", "minimum": 10**18}, [10**18], [10**18 - 1]),
        ({"type": "number", "maximum": -2e18}, [-(2**62)], [-1]),
        ({"type": "number", **DOUBLE}, ["1.5", -(2**62), 0], ["a"]),
        ({"type": "number", "minimum": -3.402823e38, "maximum": 1}, [-(2**62), "0.5"], [2]),
        ({"type": "number", "exclusiveMinimum": 1e-300}, ["0.1", 7], [0, -1]),
        ({"type": "number", "maximum": 5e-324}, [0, "-0.1"], [1, "0.0001"]),
        ({"type": "number", "maximum": -1e-300}, ["-0.1"], [0, 1]),
        ({"type": "number", "minimum": -1e-300}, ["0.1", 0], ["-0.1"]),
        ({"minimum": -0.0, "type": "number"}, [0, 1], ["-0.1"]),
        ({"type": "integer", "const": 2**53 - 1}, [2**53 - 1], [2**53]),
        ({"type": "integer", "const": 2**62}, [2**62], [2**62 + 1]),
        ({"enum": [0.1, 451705.202893]}, ["0.1", "451705.202893"], ["451705.2028930"]),
    ],
    ids=str,
)  # fmt: skip
def test_wide_bounds_are_enforced(
    vocabulary: Vocabulary, schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    assert find_error(Grammar.json_schema(schema), vocabulary) is None
    assert [value for value in good if not accepts(vocabulary, schema, str(value))] == []
    assert [value for value in bad if accepts(vocabulary, schema, str(value))] == []


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"minimum": 1e20}, f"minimum is 1e+20; the limit is {MAX_NUMBER}"),
        ({"exclusiveMaximum": -(2**70)}, f"exclusiveMaximum is {-(2**70)}; the limit is"),
        ({"minLength": 2**31}, f"minLength is 2147483648; the limit is {MAX_LENGTH}"),
        ({"minItems": -1}, f"minItems is -1; it must be an integer from 0 to {MAX_LENGTH}"),
        ({"maxItems": "3"}, "maxItems is '3'; it must be an integer from 0"),
        ({"minimum": None}, "minimum is None; it must be a number"),
        ({"multipleOf": 0}, "multipleOf is 0; it must be a number above 0"),
        ({"const": 2**53 + 1}, "constant 9007199254740993 has too many digits"),
        ({"enum": [{"a": [451705.20289303036]}]}, "has too many digits; the limit is 15"),
        ({"uniqueItems": True}, 'this server does not implement "uniqueItems"'),
        ({"propertyNames": {"pattern": "^a"}}, 'does not implement "propertyNames"'),
        ({"propertyNames": {"maxLength": 3}}, 'does not implement "propertyNames"'),
        ({"required": "a"}, 'required is "a", which has the wrong type'),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_in_a_sentence_with_its_place(
    vocabulary: Vocabulary, schema: dict[str, Any], sentence: str
) -> None:
    whole = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    error = find_error(Grammar.json_schema(whole, "where"), vocabulary)
    assert isinstance(error, InvalidRequestError)
    assert error.message.startswith("where cannot be used at /properties/a: "), error.message
    assert sentence in error.message
    lark = find_error(Grammar.lark(f"start: %json {json.dumps(whole)}"), vocabulary)
    assert lark is not None


def test_constraints_that_exclude_each_other_are_named(vocabulary: Vocabulary) -> None:
    schema = {"format": "date", "pattern": "^x$", "type": "string"}
    error = find_error(Grammar.json_schema(schema, "where"), vocabulary)
    assert error is not None
    assert error.message == "where cannot be used: no text matches pattern, format and lengths"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400])
def test_a_number_outside_the_doubles_is_refused(vocabulary: Vocabulary, number: str) -> None:
    grammar = Grammar.json_schema(f'{{"x-limit": {number}}}', "where")
    error = find_error(grammar, vocabulary)
    assert error is not None
    assert "in the range of a double" in error.message


def test_the_schemas_in_a_lark_grammar_are_simplified_too(vocabulary: Vocabulary) -> None:
    schema = {"format": "path", "uniqueItems": False, "type": "string"}
    grammar = Grammar.lark(f'start: "<" %json {json.dumps(schema)} ">" %json {{"const": 1}}')
    assert find_error(grammar, vocabulary) is None
    assert accepts(vocabulary, grammar, '<"a">1')


OBJECT = {"type": "object", "patternProperties": {"^p": {"type": "array"}}}


@pytest.mark.parametrize(
    "grammar",
    [Grammar.json_schema(OBJECT), Grammar.lark(f"start: %json {json.dumps(OBJECT)}")],
    ids=["schema", "schema in Lark"],
)
def test_white_space_is_as_json_dumps_writes_it(vocabulary: Vocabulary, grammar: Grammar) -> None:
    values: list[dict[str, Any]] = [{}, {"a": 1, "b": {"p": [1, []]}, "pq": [{}]}, {"p": [None]}]
    for value in values:
        assert accepts(vocabulary, grammar, json.dumps(value))
    for text in ['{"a":1}', "{ }", ' {"a": 1}', '{"a": 1} ', '{"p": [1,2]}', '{\n  "a": 1\n}']:
        assert not accepts(vocabulary, grammar, text)
    for value in values[1:]:
        assert not accepts(vocabulary, grammar, json.dumps(value, separators=(",", ":")))
        assert not accepts(vocabulary, grammar, json.dumps(value, indent=1))


def test_a_free_key_may_be_repeated_and_a_declared_one_may_not(vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "properties": {"a": {}}, "patternProperties": {"^p": {}}}
    for text in ('{"b": 1, "b": 2}', '{"p": 1, "p": 2}', '{"a": 0, "b": 1, "b": 1}'):
        assert accepts(vocabulary, schema, text)
    assert not accepts(vocabulary, schema, '{"a": 1, "a": 2}')


def bounds() -> Iterator[tuple[str, float]]:
    rng = Random(3)
    for _ in range(40):
        size = rng.choice([3, 2**31, 2**53, 10**18, 2**63, 2**64, 1e38])
        value: float = rng.choice([-1, 1]) * (int(size) + rng.randrange(-3, 4))
        if rng.random() < 0.3:
            value = rng.uniform(-1, 1) * 10 ** rng.randrange(-30, 12)
        yield rng.choice(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), value


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(("keyword", "bound"), list(bounds()))
def test_every_number_that_is_accepted_is_within_its_bound(
    vocabulary: Vocabulary, kind: str, keyword: str, bound: float
) -> None:
    schema = {"type": kind, keyword: bound}
    error = find_error(Grammar.json_schema(schema), vocabulary)
    if error is not None:
        assert error.message.startswith(f"grammar cannot be used: {keyword} is ")
        assert "the limit is" in error.message
        return
    exact = Decimal(str(bound))
    steps = [Decimal(1).scaleb(e) for e in range(-24, 25, 2)]
    numbers = {exact + sign * step for step in steps for sign in (-1, 1)} | {exact, Decimal(0)}
    texts = {f"{number:f}" for number in numbers}
    if kind == "integer":
        texts = {f"{number.to_integral_value():f}" for number in numbers}
    accepted = [text for text in texts if accepts(vocabulary, schema, text)]
    inside = {
        "minimum": exact.__le__,
        "maximum": exact.__ge__,
        "exclusiveMinimum": exact.__lt__,
        "exclusiveMaximum": exact.__gt__,
    }[keyword]
    assert [text for text in accepted if not inside(Decimal(text))] == []
    assert accepted


class Everything(BaseModel):
    """The types for which pydantic writes keywords that are not in the simplest schemas."""

    ids: set[int] = Field(max_length=1)
    names: dict[Literal["a", "b"], int]
    by_id: dict[UUID, str]
    data: Base64Bytes
    secret: SecretStr
    wide: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    pair: tuple[int, str]
    ratio: Annotated[float, Field(gt=0, lt=1e300)]


GENERATED = {
    "pydantic": Everything.model_json_schema(),
    "zod 4": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "scores": {
                "type": "object",
                "propertyNames": {"type": "string"},
                "additionalProperties": {"type": "number"},
            },
            "flags": {
                "type": "object",
                "propertyNames": {"type": "string", "enum": ["x", "y"]},
                "additionalProperties": {"type": "boolean"},
                "required": ["x", "y"],
            },
            "count": {"type": "integer", "minimum": -(2**53 - 1), "maximum": 2**53 - 1},
            "single": {"type": "number", **FLOAT32},
            "link": {"type": "string", "format": "uri"},
            "token": {"type": "string", "format": "jwt", "contentEncoding": "base64"},
            "nothing": {"not": {}},
            "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
        },
        "required": ["scores", "flags", "count", "link", "token"],
        "additionalProperties": False,
    },
    "zod 3": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": False},
            "pair": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "items": [{"type": "string"}, {"type": "number"}],
            },
            "never": {"not": {}},
            "any": {},
            "mail": {"type": "string", "format": "email"},
        },
        "required": ["tags", "pair"],
        "additionalProperties": False,
    },
    ".NET": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "title": "Order",
        "type": "object",
        "definitions": {"Kind": {"type": "integer", "enum": [0, 1], "x-enumNames": ["A", "B"]}},
        "properties": {
            "id": {"type": "integer", "format": "int64", **LONG},
            "kind": {"oneOf": [{"$ref": "#/definitions/Kind"}]},
            "bytes": {"type": ["null", "string"], "format": "byte"},
            "price": {"type": "number", "format": "decimal"},
            "span": {"type": "string", "format": "time-span"},
            "ulong": {"type": "integer", "minimum": 0, "maximum": 18446744073709551615},
            "any": {"type": "number", "format": "double", **DOUBLE},
        },
        "required": ["id", "kind"],
        "additionalProperties": False,
    },
    "Java": {
        "$schema": "https://json-schema.org/draft/2019-09/schema",
        "$defs": {"Tag": {"type": "string", "maxLength": 2147483647, "minLength": 0}},
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}, "maxItems": 2147483647},
            "at": {"type": "string", "format": "date-time"},
            "locale": {"type": "string", "format": "locale"},
            "file": {"type": "string", "format": "binary"},
            "size": {"type": "integer", "format": "int64", "maximum": 9223372036854775807},
            "low": {"type": "integer", "minimum": -9223372036854775808},
        },
        "unevaluatedProperties": False,
        "required": ["tags", "at"],
    },
}  # fmt: skip


@pytest.mark.parametrize("generator", GENERATED)
def test_the_schemas_of_generators_are_accepted(vocabulary: Vocabulary, generator: str) -> None:
    schema = GENERATED[generator]
    assert find_error(Grammar.json_schema(schema), vocabulary) is None


def test_a_simplified_schema_has_the_same_meaning() -> None:
    values = [None, True, 0, 2**63, -1.5, "", "a", [], [1, 1], ["a"], {}, {"a": 1}, {"b": "x"}]
    for schema in (
        {"type": "array", "uniqueItems": False, "contains": True, "minContains": 0},
        {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": STRING},
        {"unevaluatedItems": STRING, "unevaluatedProperties": {"type": "integer"}},
        {"not": {"not": {}}, "if": {"type": "string"}, "then": {}},
        {"allOf": [{"not": {}}]},
    ):
        before = Draft202012Validator(json.loads(json.dumps(schema)))
        after = Draft202012Validator(simplify(schema))
        for value in values:
            assert before.is_valid(value) == after.is_valid(value), (schema, value)
