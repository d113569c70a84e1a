"""Rewrites a JSON schema for llguidance, so that a schema that only looks unusual is accepted.

llguidance refuses every keyword and format that it does not implement, and reads numbers as doubles
and 64-bit integers. JSON Schema 2020-12 makes annotations of unknown formats, and many keywords
allow everything with the values that generators write (`uniqueItems: false`). These go. Bounds that
llguidance cannot represent move inwards to the next ones that it can, so a text that is valid under
the new schema is valid under the old one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
OF_LIST = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
OF_SCHEMA = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "propertyNames"),
    *("additionalProperties", "unevaluatedProperties", "not", "if", "then", "else"),
)
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email"} | {"hostname", "ipv4", "ipv6", "uuid", "uri"}
)
MAX_LENGTH = 2**31 - 1  # of a text, an array or an object; no output is longer
MAX_INTEGER = 2**63 - 1
MAX_NUMBER = 2**63 - 1024  # the largest double below 2^63

_EXACT = 2**53  # up to here every integer is a double
_MAX_DIGITS, _MAX_EXPONENT = 15, 22  # of a decimal that is read exactly
_NEEDS_OTHER_BOUND = 10**18  # llguidance cannot write an open range beyond it
_DRAFTS = ("draft-04/schema", "draft-06/schema", "draft-07/schema")
_DIALECTS = frozenset(
    [f"json-schema.org/{draft}" for draft in _DRAFTS]
    + [f"json-schema.org/draft/{year}/schema" for year in ("2019-09", "2020-12")]
)
_ANNOTATIONS = ("default", "examples", "example", "contentSchema")
_LEAST = ("minLength", "minItems", "minProperties", "minContains")
_MOST = ("maxLength", "maxItems", "maxProperties", "maxContains")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_FOR_STRINGS = frozenset({"minLength", "maxLength", "pattern", "format"})
_FOR_OTHER_TYPES = frozenset(
    {*_BOUNDS, "multipleOf", "minItems", "maxItems", "uniqueItems", "contains", "minContains"}
    | {"maxContains", "prefixItems", "items", "additionalItems", "unevaluatedItems", "properties"}
    | {"patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"}
    | {"required", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas"}
    | {"dependencies"}
)
_FOR_ALL_TYPES = frozenset(
    {"type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "else"}
    | {"$ref", "$dynamicRef", "$recursiveRef"}
)
_CONSTRAINTS = _FOR_STRINGS | _FOR_OTHER_TYPES | _FOR_ALL_TYPES
# With one of these, other schemas decide which properties or items are evaluated.
_IN_PLACE = frozenset({"$ref", "$dynamicRef", "$recursiveRef", "anyOf", "oneOf", "allOf"}) | {
    *("if", "dependentSchemas", "contains")
}

Path = tuple[str, ...]


class SchemaError(ValueError):
    """A value in a schema that cannot be used. path: the keys that lead to its schema."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(problem)
        self.path, self.problem = path, problem


def simplify(schema: Any) -> Any:
    """A schema for llguidance with the meaning of `schema`, which is changed.

    Values of keywords that are not understood stay as they are. Raises SchemaError.
    """
    rewriter = _Rewriter()
    root = rewriter.rewrite(schema, ())
    # References may lead to places that no keyword of JSON Schema names, such as `components`.
    while rewriter.references:
        path = _pointer(rewriter.references.pop())
        holder, target = _follow(root, path)
        if isinstance(target, dict) and id(target) not in rewriter.seen:
            holder[path[-1]] = rewriter.rewrite(target, path)
    return root


class _Rewriter:
    """seen: ids of the schemas that are rewritten. references: found in them, to be followed."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.references: list[str] = []

    def rewrite(self, schema: Any, path: Path) -> Any:
        if not isinstance(schema, dict):
            return schema
        self.seen.add(id(schema))
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            self.references.append(reference)
        for holder, key, inner in _subschemas(schema):
            holder[key] = self.rewrite(holder[key], path + inner)
        for keyword in _ANNOTATIONS:
            schema.pop(keyword, None)
        for step in _STEPS:
            step(schema, path)
        return False if _allows_nothing(schema) else schema


def _subschemas(schema: dict[str, Any]) -> Iterator[tuple[Any, Any, Path]]:
    """The object or array that holds each direct subschema, its key there, and its path."""
    for name, value in list(schema.items()):
        if name in OF_SCHEMAS and isinstance(value, dict):
            yield from ((value, key, (name, key)) for key in list(value))
        elif name in OF_LIST and isinstance(value, list):
            yield from ((value, i, (name, str(i))) for i in range(len(value)))
        elif name in OF_SCHEMA and isinstance(value, dict):
            yield schema, name, (name,)


def _read_dialect(schema: dict[str, Any], path: Path) -> None:
    """An unknown dialect is read as the newest draft."""
    dialect = schema.get("$schema")
    if dialect is not None:
        plain = str(dialect).rstrip("#").removeprefix("https://").removeprefix("http://")
        if plain not in _DIALECTS:
            del schema["$schema"]
    if "$dynamicAnchor" in schema:  # without a $dynamicRef, an anchor
        schema.setdefault("$anchor", schema.pop("$dynamicAnchor"))


def _drop_format(schema: dict[str, Any], path: Path) -> None:
    if "format" not in schema:
        return
    if not isinstance(schema["format"], str):
        raise SchemaError(path, f"format is {_shown(schema['format'])}; it must be a string")
    if schema["format"] not in FORMATS:
        del schema["format"]


def _limit_lengths(schema: dict[str, Any], path: Path) -> None:
    for keyword in (*_LEAST, *_MOST):
        if keyword not in schema:
            continue
        value = schema[keyword]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SchemaError(
                path, f"{keyword} is {_shown(value)}; it must be an integer from 0 to {MAX_LENGTH}"
            )
        schema[keyword] = value
        if keyword in _LEAST and value > MAX_LENGTH:
            raise SchemaError(path, f"{keyword} is {_shown(value)}; the limit is {MAX_LENGTH}")
        if value > MAX_LENGTH or (value == 0 and keyword in _LEAST and keyword != "minContains"):
            del schema[keyword]


def _limit_numbers(schema: dict[str, Any], path: Path) -> None:
    """Move bounds that llguidance would round, or cannot read, inwards."""
    given = [keyword for keyword in _BOUNDS if keyword in schema]
    for keyword in given:
        value = schema[keyword]
        if isinstance(value, bool) and keyword.startswith("exclusive"):  # of draft 4
            continue
        if not _is_number(value):
            raise SchemaError(path, f"{keyword} is {_shown(value)}; it must be a number")
        _limit_number(schema, keyword, _is_integer(schema), path)
    low = max((_value(schema, key) for key in ("minimum", "exclusiveMinimum")), default=-math.inf)
    high = min(_value(schema, key, math.inf) for key in ("maximum", "exclusiveMaximum"))
    if low >= _NEEDS_OTHER_BOUND and high == math.inf:
        schema["maximum"] = MAX_INTEGER if _is_integer(schema) else MAX_NUMBER
    if high <= -_NEEDS_OTHER_BOUND and low == -math.inf:
        schema["minimum"] = -MAX_NUMBER


def _limit_number(schema: dict[str, Any], keyword: str, integer: bool, path: Path) -> None:
    value = schema[keyword]
    lower, exclusive = keyword.lower().endswith("minimum"), keyword.startswith("exclusive")
    if exclusive and integer and math.isfinite(value) and abs(value) > _EXACT:
        value, exclusive = int(value) + (1 if lower else -1), False
    if (value > MAX_NUMBER) if lower else (value < -MAX_NUMBER):
        shown = f"{'' if lower else '-'}{MAX_NUMBER}"
        raise SchemaError(path, f"{keyword} is {_shown(value)}; the limit is {shown}")
    bound = _inner_bound(value, lower, exclusive, MAX_INTEGER if integer else MAX_NUMBER)
    if bound is None:
        return
    del schema[keyword]
    keyword = "minimum" if lower else "maximum"
    other = schema.get(keyword)
    if _is_number(other):
        bound = max(bound, other) if lower else min(bound, other)
    schema[keyword] = bound


def _inner_bound(value: float, lower: bool, exclusive: bool, limit: int) -> float | None:
    """The first bound at or inside `value` that llguidance takes, inclusive; None if it is `value`.

    limit: the highest that it takes.
    """
    if lower and value < -MAX_NUMBER:
        return -MAX_NUMBER
    if not lower and (value > limit or (value == limit and not exclusive)):
        return limit
    if abs(value) > _EXACT:
        double = float(value)
        outside = double < value if lower else double > value
        if outside or (exclusive and double == value):
            double = math.nextafter(double, math.inf if lower else -math.inf)
        return int(double)
    if _is_exact(value):
        return None
    written = Decimal(repr(value))
    rounding = ROUND_CEILING if lower else ROUND_FLOOR
    rounded = Context(prec=_MAX_DIGITS, rounding=rounding).plus(written)
    if abs(value) < 1:
        places = Decimal(1).scaleb(-_MAX_EXPONENT)
        rounded = rounded.quantize(places, rounding, Context(prec=2 * _MAX_EXPONENT))
    return float(rounded)


def _is_exact(number: float) -> bool:
    """Whether llguidance's reader, which rounds twice, reads the number as it is written."""
    if isinstance(number, int) or (number.is_integer() and abs(number) <= _EXACT):
        return abs(number) <= _EXACT or (abs(number) < 2**63 and float(number) == number)
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)
    return len(digits) <= _MAX_DIGITS and abs(exponent) <= _MAX_EXPONENT


def _check_multiple(schema: dict[str, Any], path: Path) -> None:
    value = schema.get("multipleOf", 1)
    if not _is_number(value) or not value > 0:
        raise SchemaError(path, f"multipleOf is {_shown(value)}; it must be a number above 0")


def _check_constants(schema: dict[str, Any], path: Path) -> None:
    constants = [*([schema["const"]] if "const" in schema else [])]
    if isinstance(schema.get("enum"), list):
        constants += schema["enum"]
    for value in constants:
        for number in _numbers(value):
            if not _is_exact(number):
                raise SchemaError(
                    path,
                    f"the constant {_shown(number)} has too many digits; the limit is "
                    f"{_MAX_DIGITS}, and {_EXACT} for an integer",
                )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif _is_number(value):
        yield value


def _drop_array_keywords(schema: dict[str, Any], path: Path) -> None:
    if schema.get("uniqueItems") is False or schema.get("maxItems", 2) in (0, 1):
        schema.pop("uniqueItems", None)
    if "contains" not in schema or (schema.get("minContains") == 0 and "maxContains" not in schema):
        for keyword in ("contains", "minContains", "maxContains"):
            schema.pop(keyword, None)


def _drop_conditions(schema: dict[str, Any], path: Path) -> None:
    for keyword in ("then", "else"):
        if keyword in schema and ("if" not in schema or _allows_all(schema[keyword])):
            del schema[keyword]
    if "then" not in schema and "else" not in schema:
        schema.pop("if", None)
    if schema.get("not") is False:
        del schema["not"]
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        value = schema.get(keyword)
        if isinstance(value, dict) and all(
            part == [] or _allows_all(part) for part in value.values()
        ):
            del schema[keyword]


def _drop_unevaluated(schema: dict[str, Any], path: Path) -> None:
    """Where no other schema evaluates anything, what is unevaluated is what is additional."""
    alone = not _IN_PLACE & schema.keys()
    for keyword, plain in (
        ("unevaluatedProperties", "additionalProperties"),
        ("unevaluatedItems", "items"),
    ):
        if keyword in schema and (alone or _allows_all(schema[keyword])):
            value = schema.pop(keyword)
            if not _allows_all(value):
                schema.setdefault(plain, value)


def _limit_names(schema: dict[str, Any], path: Path) -> None:
    """Names out of a list become properties; a schema that allows every string goes."""
    names = schema.get("propertyNames")
    if names is None:
        return
    if _allows_every_name(names):
        del schema["propertyNames"]
        return
    constraints = _CONSTRAINTS & names.keys() if isinstance(names, dict) else {"false"}
    if "patternProperties" in schema or not constraints <= {"type", "enum", "const"}:
        return
    allowed = names["enum"] if "enum" in names else [names.get("const")]
    given = schema.get("properties", {})
    if not isinstance(allowed, list) or not isinstance(given, dict) or len(constraints) > 2:
        return
    others = schema.get("additionalProperties", True)
    del schema["propertyNames"]
    first = [name for name in given if name in allowed]
    rest = [name for name in allowed if isinstance(name, str) and name not in given]
    schema["properties"] = {name: given.get(name, others) for name in first + rest}
    schema["additionalProperties"] = False


def _allows_every_name(schema: Any) -> bool:
    """Formats do not count here: they are annotations, and are enforced only for values."""
    if not isinstance(schema, dict):
        return schema is True
    kinds = schema.get("type", "string")
    constraints = (_CONSTRAINTS - _FOR_OTHER_TYPES - {"type", "format"}) & schema.keys()
    return not constraints and (
        kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    )


def _allows_all(schema: Any) -> bool:
    return schema is True or (isinstance(schema, dict) and not _CONSTRAINTS & schema.keys())


def _allows_nothing(schema: dict[str, Any]) -> bool:
    return "not" in schema and _allows_all(schema["not"])


_STEPS: tuple[Callable[[dict[str, Any], Path], None], ...] = (
    _read_dialect,
    _drop_format,
    _limit_lengths,
    _limit_numbers,
    _check_multiple,
    _check_constants,
    _drop_array_keywords,
    _drop_conditions,
    _drop_unevaluated,
    _limit_names,
)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type")
    return "integer" in kinds and "number" not in kinds if isinstance(kinds, list | str) else False


def _value(schema: dict[str, Any], keyword: str, default: float = -math.inf) -> float:
    value = schema.get(keyword)
    return value if _is_number(value) else default


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def _pointer(reference: str) -> Path:
    parts = unquote(reference.removeprefix("#/")).split("/")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)


def _follow(root: Any, path: Path) -> tuple[Any, Any]:
    """What a path leads to and the object that holds it; None where it leads nowhere."""
    holder, value = None, root
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return None, None
        holder, value = value, value[name]
    return holder, value
