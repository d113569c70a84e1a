"""JSON schemas of every feature that we claim, made from a seed; their texts are bounded."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]

WORDS = ["alpha", "beta", "x y", 'quo"te', "back\\slash", "ü", "日本", "tab\t", "", "0"]


def make_schema(seed: int) -> Schema:
    """An object, array or union at the root, with up to three levels below."""
    rng = Random(seed)
    schema = rng.choice([_object, _object, _object, _array, _any_of, _with_defs])(rng, 3)
    if seed % 7 == 0:
        schema["title"], schema["description"] = "A title", "Said of it."
    return schema


def _value(rng: Random, depth: int) -> Schema:
    flat = [_string, _string, _integer, _number, _enum, _const, _simple, _format, _pattern]
    nested = [_object, _object, _array, _tuple, _any_of, _one_of, _all_of]
    return rng.choice(flat + nested if depth > 0 else flat)(rng, depth)


def _string(rng: Random, depth: int) -> Schema:
    low = rng.randrange(4)
    schema: Schema = {"type": "string", "maxLength": low + rng.randrange(6)}
    return schema | ({"minLength": low} if low else {})


def _integer(rng: Random, depth: int) -> Schema:
    low = rng.randrange(-1000, 1000)
    high = low + rng.choice([0, 1, 9, 123, 10**6])
    schema = rng.choice(
        [
            {"minimum": low, "maximum": high},
            {"exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1},
            {"minimum": low, "maximum": low + 100, "multipleOf": rng.choice([2, 3, 7, 10])},
        ]
    )
    return {"type": "integer", **schema}


def _number(rng: Random, depth: int) -> Schema:
    low = rng.choice([-2.5, 0, 0.125, 10])
    bounds = {rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": 99.5}
    return {"type": "number", "multipleOf": 0.25, **bounds}


def _enum(rng: Random, depth: int) -> Schema:
    values: list[Any] = [*WORDS, 1, -2.5, True, None, {"a": [1]}, []]
    return {"enum": rng.sample(values, rng.randrange(1, 5))}


def _const(rng: Random, depth: int) -> Schema:
    return {"const": rng.choice([*WORDS, 7, False, None, {"k": "v"}, [1, "a"]])}


def _simple(rng: Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _format(rng: Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(["uuid", "ipv4", "ipv6"])}


def _pattern(rng: Random, depth: int) -> Schema:
    patterns = ["^[a-z]{2,5}$", "^(ab|cd)?x{1,3}$", r"^\d{3}-\d{2}$", "^[A-F0-9]{4}$", "^é[^a-z]$"]
    return {"type": "string", "pattern": rng.choice(patterns)}


def _array(rng: Random, depth: int) -> Schema:
    low = rng.randrange(3)
    schema: Schema = {"type": "array", "items": _value(rng, depth - 1), "maxItems": low + 2}
    return schema | ({"minItems": low} if low else {})


def _tuple(rng: Random, depth: int) -> Schema:
    items = [_value(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _object(rng: Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "a b", "ü", 'q"', "list", "flag", "n1", "n2"], 3)
    schema: Schema = {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names[: rng.randrange(1, 4)]},
        "additionalProperties": False,
    }
    required = [name for name in schema["properties"] if rng.random() < 0.7]
    if rng.random() < 0.2:
        required = list(schema["properties"])  # a number of properties is counted only then
        schema["patternProperties"] = {"^p[0-9]$": {"type": "boolean"}}
        schema["maxProperties"] = len(names) + 1
    return schema | ({"required": required} if required else {})


def _any_of(rng: Random, depth: int) -> Schema:
    return {"anyOf": [_value(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}


def _one_of(rng: Random, depth: int) -> Schema:
    tags = rng.sample(["cat", "dog", "bird"], 2)
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": tag}, "value": _value(rng, depth - 1)},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for tag in tags
        ]
    }


def _all_of(rng: Random, depth: int) -> Schema:
    low = rng.randrange(50)
    return {
        "allOf": [{"type": "integer", "minimum": low}, {"maximum": low + rng.randrange(60)}],
    }


def _with_defs(rng: Random, depth: int) -> Schema:
    node = {
        "type": "object",
        "properties": {
            "value": _value(rng, 0),
            "next": {"$ref": "#/$defs/end"},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    endless = rng.random() < 0.25  # a model may go on with it
    end = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]} if endless else {"const": "end"}
    return {
        "$defs": {"node": node, "end": end},
        "type": "object",
        "properties": {"head": {"$ref": "#/$defs/node"}},
        "required": ["head"],
        "additionalProperties": False,
    }


FEATURES: list[Callable[[Random, int], Schema]] = [
    _string, _integer, _number, _enum, _const, _simple, _format, _pattern,
    _array, _tuple, _object, _any_of, _one_of, _all_of, _with_defs,
]  # fmt: skip
