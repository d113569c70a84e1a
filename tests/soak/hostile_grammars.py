"""Grammars that are large, endless or wrong, for every field that takes one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.soak.hostile import Hostile
from tests.soak.hostile_bodies import Raw, value, write
from tests.soak.raw_http import request_bytes
from tests.support.schemas import make_schema

_PRIMES = [97, 991, 997, 7919, 9967, 9973]


def _multiples(rng: random.Random) -> Any:
    first, second = rng.sample(_PRIMES, 2)
    return rng.choice(
        [
            {"type": "integer", "allOf": [{"multipleOf": first}, {"multipleOf": second}]},
            {"$defs": {"a": {"multipleOf": first}}, "$ref": "#/$defs/a", "multipleOf": second},
            {"type": "number", "multipleOf": Raw("0." + "0" * rng.choice([3, 30, 300]) + "1")},
            {"type": "integer", "multipleOf": Raw("7" * rng.choice([3, 20, 5000]))},
        ]
    )


def _lengths(rng: random.Random) -> Any:
    size = rng.choice([10, 1000, 100_000, 2**31, 2**63])
    return rng.choice(
        [
            {"type": "string", "minLength": size, "maxLength": size + rng.choice([-1, 0, 1, 99])},
            {"type": "array", "items": {"type": "integer"}, "minItems": size, "maxItems": size},
            {"type": "array", "prefixItems": [{"type": "integer"}] * min(size, 3000)},
            {"type": "object", "minProperties": size},
            {"type": "integer", "minimum": -size, "maximum": 10**30},
        ]
    )


def _wide(rng: random.Random) -> Any:
    count = rng.choice([10, 300, 5000])
    return rng.choice(
        [
            {"enum": [f"value {i}" for i in range(count)]},
            {"anyOf": [{"const": i} for i in range(count)]},
            {"oneOf": [{"type": "string", "maxLength": i} for i in range(count)]},
            {"type": "object", "properties": {f"k{i}": {} for i in range(count)}},
            {"type": "object", "required": [f"k{i}" for i in range(count)]},
            {"allOf": [{"pattern": f"a{{{i}}}"} for i in range(min(count, 50))]},
        ]
    )


def _recursive(rng: random.Random) -> Any:
    return rng.choice(
        [
            {"$ref": "#"},
            {"$ref": "#/$defs/none"},
            {"$ref": "http://127.0.0.1:1/schema.json"},
            {"$ref": "file:///etc/passwd"},
            {
                "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                "$ref": "#/$defs/a",
            },
            {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            {"type": "array", "items": {"$ref": "#"}, "minItems": 2},
            {"allOf": [{"$ref": "#"}]},
            {"not": {"$ref": "#"}},
        ]
    )


def _doubled(rng: random.Random) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(rng.choice([3, 12, 20])):
        keyword = rng.choice(["anyOf", "allOf", "items", "properties"])
        schema = {
            "anyOf": {"anyOf": [schema, {"type": "null"}]},
            "allOf": {"allOf": [schema, {}]},
            "items": {"type": "array", "items": schema},
            "properties": {"type": "object", "properties": {"a": schema}, "required": ["a"]},
        }[keyword]
    return schema


def _random_schema(rng: random.Random) -> Any:
    schema = make_schema(rng.randrange(10**6))
    if rng.random() < 0.5:
        schema[rng.choice(["type", "pattern", "format", "enum", "$ref", "const"])] = value(rng)
    return schema


_SCHEMAS: list[Callable[[random.Random], Any]] = [
    _multiples,
    _lengths,
    _wide,
    _recursive,
    _doubled,
    _random_schema,
    value,
]


def _regex(rng: random.Random) -> str:
    size = rng.choice([5, 100, 1000, 100_000])
    return rng.choice(
        [
            f"(a{{{size}}}){{{size}}}",
            f"((a|b){{1,{size}}}){{1,{size}}}",
            f"(.*a){{{size}}}",
            f"[a-z]{{0,{size}}}x[a-z]{{0,{size}}}",
            f"(a|aa)+{{{size}}}",
            "(a+)+$",
            "(?=a)b(?!c)",
            "(?<name>a)\\k<name>\\1",
            "\\p{L}{1000}\\P{Zs}",
            "[^\\s\\S]",
            "a" * size,
            "(" * min(size, 5000),
            "[z-a]",
            "a{5,2}",
            "\\",
            "\ud7ff[\U0001f600-\U0001f64f]*",
            "|".join(f"w{i}" for i in range(min(size, 3000))),
            "",
        ]
    )


def _lark(rng: random.Random) -> str:
    size = rng.choice([5, 300, 5000])
    return rng.choice(
        [
            "start: start",
            "start: a\na: b\nb: a",
            "start: missing",
            "start: " + "(" * size + '"a"' + ")" * size,
            "start: " + " ".join(['"a"?'] * size),
            'start: ("a"*)*',
            f'start: "a"~{size}..{size * 10}',
            "\n".join(
                ["start: r0"] + [f"r{i}: r{i + 1} r{i + 1}" for i in range(25)] + ['r25: "a"']
            ),
            "start: /(a{1000}){1000}/",
            'root ::= "a" root | ""',
            "root ::= " + "( " * size + '"a"' + " )" * size,
            "root ::= [a-z]{" + str(size) + "}",
            "%import common.NUMBER\nstart: NUMBER",
            '%llguidance {"no_forcing": true}\nstart: "a"',
            "start: <|endoftext|> %json {}",
            "",
            "\0",
            "start:\n" * size,
        ]
    )


def hostile_grammar(rng: random.Random) -> Hostile:
    """A request with a grammar in one of its fields."""
    kind = rng.choice(["schema", "schema", "regex", "lark", "choice", "tool"])
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 3}
    path = "/v1/completions"
    if kind == "schema":
        schema = rng.choice(_SCHEMAS)(rng)
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body |= rng.choice([{"guided_json": schema}, {"response_format": wrapped}])
    elif kind == "tool":
        parameters = rng.choice(_SCHEMAS)(rng)
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        body |= {"tools": [tool], "tool_choice": "required"}
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        path = "/v1/chat/completions"
    elif kind == "choice":
        size = rng.choice([0, 1, 1000, 20_000])
        body["guided_choice"] = rng.choice(
            [[f"c{i}" for i in range(size)], ["a"] * size, value(rng)]
        )
    else:
        fields = {"regex": ("regex", _regex), "lark": ("guided_grammar", _lark)}
        name, make = fields[kind]
        body[name] = make(rng)
    data = write(body).encode("utf-8", "surrogatepass")
    return Hostile("grammar", (request_bytes(path, data),))
