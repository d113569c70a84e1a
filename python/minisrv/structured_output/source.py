"""Translates a Grammar into the input of llguidance, which constrains the output.

llguidance is imported by the functions that call it: an engine without grammars runs without it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.json_schema import SchemaError, simplify

MAX_CHOICES = 10_000

# White space is fixed, as `json.dumps` writes it: where it is optional, a model may write nothing
# else until its token limit.
JSON_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


def to_source(grammar: Grammar) -> str:
    """llguidance's source of a grammar. Raises InvalidRequestError if it cannot be parsed."""
    source = _text_source(grammar)
    return _prepend_rule(source, grammar.before) if grammar.before else source


def _prepend_rule(source: str, before: str) -> str:
    """A Lark grammar that starts with the rule `before`, which refers to `source` as `@text`."""
    text = {"lark_grammar": source}
    if source.startswith("{"):
        (text,) = json.loads(source)["grammars"]
    main = {"lark_grammar": f"start: {before}"}
    return json.dumps({"grammars": [main, {**text, "name": "text"}]})


def _text_source(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_schema":
            return _json_source(grammar)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_lark(_choice_lark(grammar))
        case "lark":
            return LLMatcher.grammar_from_lark(_lark(grammar))
    raise InvalidRequestError(f"unknown kind of grammar: {grammar.kind!r}", param=grammar.param)


def _json_source(grammar: Grammar) -> str:
    schema = read_schema(grammar)
    try:
        return json_source(schema)
    except (RecursionError, ValueError):
        raise InvalidRequestError(
            f"{grammar.param} is nested too deeply", param=grammar.param
        ) from None


def read_schema(grammar: Grammar) -> Any:
    """The schema of a json_schema grammar, simplified. Raises InvalidRequestError."""
    try:
        schema = _DECODER.decode(grammar.text)
    except RecursionError:
        raise InvalidRequestError(
            f"{grammar.param} is nested too deeply", param=grammar.param
        ) from None
    except ValueError as error:
        raise InvalidRequestError(
            f"{grammar.param} is not valid JSON: {error}", param=grammar.param
        ) from None
    schema = _simplified(schema, grammar.param)
    if schema is False:
        raise InvalidRequestError(f"{grammar.param} allows no text", param=grammar.param)
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            f"{grammar.param} must be a JSON schema (an object)", param=grammar.param
        )
    return schema


def _simplified(schema: Any, param: str) -> Any:
    try:
        return simplify(schema)
    except SchemaError as error:
        place = show_place(error.path)
        raise InvalidRequestError(
            f"{param} cannot be used{place}: {error.problem}", param=param
        ) from None
    except RecursionError:
        raise InvalidRequestError(f"{param} is nested too deeply", param=param) from None


def show_place(path: Sequence[str]) -> str:
    """ " at " and the JSON pointer of keys; nothing for the whole schema."""
    names = (name.replace("~", "~0").replace("/", "~1") for name in path)
    return f" at /{'/'.join(names)}" if path else ""


def _refuse_number(text: str) -> NoReturn:
    shown = text if len(text) <= 20 else f"{text[:20]}..."
    raise ValueError(f"{shown} is not a number in the range of a double")


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _int(text: str) -> int:
    return int(text) if math.isfinite(float(text)) else _refuse_number(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_float, parse_int=_int)


def json_source(schema: Any) -> str:
    """llguidance's source of a schema, which is not validated.

    Raises ValueError if it is nested too deeply.
    """
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def _choice_lark(grammar: Grammar) -> str:
    try:
        choices = json.loads(grammar.text)
    except ValueError:
        choices = None
    valid = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not valid or not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequestError(
            f"{grammar.param} must be an array of 1 to {MAX_CHOICES} non-empty strings",
            param=grammar.param,
        )
    # A terminal (in capitals) becomes a single automaton; as rules, each would be a parser item.
    return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, dict.fromkeys(choices)))


def _lark(grammar: Grammar) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(_with_simplified_schemas(grammar))
    except InvalidRequestError:
        raise
    except Exception as error:  # the converter raises exceptions of many types
        raise InvalidRequestError(
            f"{grammar.param} is not a valid grammar: {error}", param=grammar.param
        ) from None


def _with_simplified_schemas(grammar: Grammar) -> str:
    """The text of a Lark grammar in which each schema behind `%json` is simplified.

    llguidance reads each one with the same options as a schema that is a grammar by itself.
    """
    parts, at = [], 0
    for match in re.finditer(r"%json\s*(?=\{)", grammar.text):
        if match.start() < at:
            continue
        try:
            schema, end = _DECODER.raw_decode(grammar.text, match.end())
        except (ValueError, RecursionError):  # llguidance says what is wrong
            continue
        simplified = _simplified(schema, grammar.param)
        if isinstance(simplified, dict):
            simplified = {**simplified, "x-guidance": JSON_OPTIONS}
        parts += [grammar.text[at : match.end()], json.dumps(simplified)]
        at = end
    return "".join([*parts, grammar.text[at:]])
