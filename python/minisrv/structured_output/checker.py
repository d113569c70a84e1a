"""Checks a grammar before it is compiled; an error says where a schema is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.json_schema import OF_LIST, OF_SCHEMA, OF_SCHEMAS
from minisrv.structured_output.source import json_source, read_schema, show_place, to_source
from minisrv.structured_output.vocabulary import Vocabulary

_MAX_PROBES = 200
_MAX_MULTIPLE = 100_000  # takes 0.7 s to compile
_MAX_SHOWN_CHARS = 300

# What llguidance says of a schema, and a sentence for the person who wrote it.
_SENTENCES = (
    (r"^Unimplemented keys: \[(.*)\]$", r"this server does not implement \1"),
    (r"^Unsatisfiable schema: Regex is empty: .*$", "no text matches pattern, format and lengths"),
    (r"^Unsatisfiable schema: ", "no value is valid: "),
    (r"^Resource '(.*)' is not present in a registry.*$", r"'\1' is not within the schema"),
    (r"^Expected \w+ for '(.*)', got (.*)$", r"\1 is \2, which has the wrong type"),
)


def find_error(grammar: Grammar, vocabulary: Vocabulary) -> InvalidRequestError | None:
    """Why the grammar, or the first of its parts that is wrong, cannot be used; None if it can."""
    try:
        check(grammar, vocabulary)
        vocabulary.compile(to_source(grammar))
    except InvalidRequestError as error:
        error.param = grammar.param
        return next(filter(None, (find_error(part, vocabulary) for part in grammar.parts)), error)
    return None


def check(grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Raise InvalidRequestError unless llguidance can read the grammar; compiles nothing."""
    _check_multiples(grammar)
    error = vocabulary.find_error(to_source(grammar))
    if error is None:
        return
    place = ""
    if grammar.kind == "json_schema":
        place = show_place(_locate(read_schema(grammar), error, vocabulary))
    raise InvalidRequestError(
        f"{grammar.param} cannot be used{place}: {_shortened(error)}", param=grammar.param
    )


def _check_multiples(grammar: Grammar) -> None:
    """Limit multipleOf: llguidance makes a state per remainder without counting these."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), grammar.text)
    for number in re.findall(r'multipleOf"\s*:\s*([0-9.eE+-]+)', text):
        try:
            value = Decimal(number)
        except InvalidOperation:  # not JSON: find_error reports that with a better message
            continue
        digits = Decimal((0, value.as_tuple().digits, 0))
        if digits > _MAX_MULTIPLE or value > _MAX_MULTIPLE:
            raise InvalidRequestError(
                f"{grammar.param} has a multipleOf of {number[:40]}; the limit is {_MAX_MULTIPLE}, "
                "not counting the decimal point",
                param=grammar.param,
            )


def _locate(schema: Any, error: str, vocabulary: Vocabulary) -> list[str]:
    """The path to the innermost subschema that by itself gives the same error."""
    path: list[str] = []
    probes = 0
    shared = {
        name: schema[name]
        for name in ("$defs", "definitions")
        if isinstance(schema, dict) and name in schema
    }
    parts = _parts(schema)
    while probes < _MAX_PROBES and (part := next(parts, None)) is not None:
        probes += 1
        names, value = part
        isolated = {**shared, **value} if isinstance(value, dict) else value
        if vocabulary.find_error(json_source(isolated)) == error:
            path += names
            parts = _parts(value)
    return path


def _parts(schema: Any) -> Iterator[tuple[tuple[str, str] | tuple[str], Any]]:
    """The direct subschemas of a schema, each with the keys that lead to it."""
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        if name in OF_SCHEMAS and isinstance(value, dict):
            yield from (((name, key), part) for key, part in value.items())
        elif name in OF_LIST and isinstance(value, list):
            yield from (((name, str(i)), part) for i, part in enumerate(value))
        elif name in OF_SCHEMA and isinstance(value, dict):
            yield (name,), value


def _shortened(error: str) -> str:
    """llguidance's message on one line; a diagram of a regex is replaced by the position."""
    diagram = re.search(r"regex parse error:\n(.*)\n( *)\^+\nerror: (.*)", error)
    if diagram is not None:
        place = len(diagram[2]) - 4
        return f"regex, at character {place}: {diagram[3]}"
    text = " ".join(line.strip() for line in error.splitlines() if line.strip(" ^"))
    for pattern, sentence in _SENTENCES:
        text = re.sub(pattern, sentence, text)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."
