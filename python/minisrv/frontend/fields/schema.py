"""The small part of JSON Schema that requests need: one description for the check and the docs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from minisrv.errors import InvalidRequestError

_MAX_SHOWN_CHARS = 60
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**63 - 1
# By `type`: its name in a sentence, and the Python types of its values.
_TYPES: dict[str, tuple[str, frozenset[type[Any]]]] = {
    "boolean": ("true or false", frozenset({bool})),
    "integer": ("an integer", frozenset({int})),
    "number": ("a number", frozenset({int, float})),
    "string": ("a string", frozenset({str})),
    "array": ("an array", frozenset({list})),
    "object": ("an object", frozenset({dict})),
}


_Fits = Callable[[Any], bool]


class Schema(dict[str, Any]):
    """A JSON schema. `fits` says whether a value fits, `check_value` also where it does not."""

    @cached_property
    def fits(self) -> _Fits:
        """Compiled at the first use, since a body may hold thousands of values to check."""
        return _compile(self)


ANY = Schema()
BOOLEAN = Schema(type="boolean")
INTEGER = Schema(type="integer")
NUMBER = Schema(type="number")
STRING = Schema(type="string")
OBJECT = Schema(type="object")


def array_of(items: Schema) -> Schema:
    return Schema(type="array", items=items)


INTEGERS = array_of(INTEGER)
STRINGS = array_of(STRING)


def any_of(*schemas: Schema) -> Schema:
    return Schema(anyOf=list(schemas))


def one_of(*texts: str) -> Schema:
    return Schema(type="string", enum=list(texts))


def object_of(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    """An object with these properties, of which the `required` ones must be there."""
    return Schema(type="object", required=list(required), properties=properties)


def between(low: float, high: float, schema: Schema = NUMBER) -> Schema:
    """A number from `low` to `high`."""
    return Schema({**schema, "minimum": low, "maximum": high})


def check_value(value: Any, schema: Schema, path: str) -> None:
    """Raise InvalidRequestError, naming the dotted path, unless `value` fits `schema`.

    Strict: no string is a number, no boolean an integer, and a number fits 64 bits. A null property
    counts as absent.
    """
    if schema.fits(value):
        return
    if "anyOf" in schema:
        return _check_any(value, schema["anyOf"], path)
    type_name, kinds = _TYPES[schema["type"]]
    if type(value) not in kinds:
        raise _wrong(value, type_name, path)
    if type(value) is int and not _MIN_INTEGER <= value <= _MAX_INTEGER:
        sentence = f"{path} is an integer that does not fit 64 bits"
        raise InvalidRequestError(sentence, param=path)
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(value, "one of " + ", ".join(schema["enum"]), path)
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        raise _wrong(value, f"from {schema['minimum']} to {schema['maximum']}", path)
    if "minLength" in schema and not schema["minLength"] <= len(value) <= schema["maxLength"]:
        expected = f"{schema['minLength']} to {schema['maxLength']} characters long"
        raise _wrong(value, expected, path)
    for i, item in enumerate(value if "items" in schema else ()):
        check_value(item, schema["items"], f"{path}.{i}")
    for name in schema.get("required", ()):
        if value.get(name) is None:
            raise InvalidRequestError(f"{path}.{name} is missing", param=f"{path}.{name}")
    for name, part in schema.get("properties", {}).items():
        if value.get(name) is not None:
            check_value(value[name], part, f"{path}.{name}")


def describe(value: Any) -> str:
    """A short ASCII form of a JSON value for a message."""
    if isinstance(value, dict | list) and value:
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, str) and len(value) > _MAX_SHOWN_CHARS:
        return f"a string of {len(value)} characters"
    if type(value) is int and value.bit_length() > _MAX_INTEGER.bit_length():
        return "an integer that does not fit 64 bits"
    return json.dumps(value)


def _check_any(value: Any, schemas: list[Schema], path: str) -> None:
    errors = []
    for schema in schemas:
        if type(value) not in _TYPES[schema["type"]][1]:
            continue
        try:
            return check_value(value, schema, path)
        except InvalidRequestError as error:
            errors.append(error)
    *names, last = dict.fromkeys(_name(schema) for schema in schemas)
    expected = f"{', '.join(names)} or {last}" if names else last
    inside = [error for error in errors if error.param != path]
    if not inside:
        raise _wrong(value, expected, path)
    # An error inside the value says more than one about the whole value. If several schemas have
    # such an error, no one of them says what all schemas accept.
    first = inside[0]
    if len(inside) > 1:
        found = first.message.rpartition("; it must be ")[0] or first.message
        first.message = f"{found}; {path} must be {expected}"
    raise first


def _compile(schema: Schema) -> _Fits:
    if "anyOf" in schema:
        return _compile_any(schema["anyOf"])
    if "type" not in schema:
        return lambda value: True
    kinds = _TYPES[schema["type"]][1]
    if "items" in schema:
        return _compile_items(schema["items"])
    if "properties" in schema:
        return _compile_object(schema["required"], schema["properties"])
    if "enum" in schema:
        texts = frozenset(schema["enum"])
        return lambda value: type(value) is str and value in texts
    if "minLength" in schema:
        shortest, longest = schema["minLength"], schema["maxLength"]
        return lambda value: type(value) is str and shortest <= len(value) <= longest
    if int in kinds:
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return lambda value: (
            type(value) in kinds
            and low <= value <= high
            and (type(value) is float or _MIN_INTEGER <= value <= _MAX_INTEGER)
        )
    return lambda value: type(value) in kinds


def _compile_any(schemas: list[Schema]) -> _Fits:
    by_kind: dict[type[Any], list[_Fits]] = {}
    for schema in schemas:
        for kind in _TYPES[schema["type"]][1]:
            by_kind.setdefault(kind, []).append(schema.fits)

    def fits(value: Any) -> bool:
        choices = by_kind.get(type(value), [])
        return choices[0](value) if len(choices) == 1 else any(fits(value) for fits in choices)

    return fits


def _compile_items(items: Schema) -> _Fits:
    if set(items) == {"type"}:
        # There may be half a million token ids. Their range is checked where they are read.
        kinds = _TYPES[items["type"]][1]
        return lambda value: type(value) is list and kinds.issuperset(map(type, value))
    return lambda value: type(value) is list and all(map(items.fits, value))


def _compile_object(required: list[str], properties: dict[str, Schema]) -> _Fits:
    checks = {name: schema.fits for name, schema in properties.items()}

    def fits(value: Any) -> bool:
        if type(value) is not dict:
            return False
        for name in required:
            if value.get(name) is None:
                return False
        for name, part in value.items():
            if name in checks and part is not None and not checks[name](part):
                return False
        return True

    return fits


def _name(schema: Schema) -> str:
    name = _TYPES[schema["type"]][0]
    return f"{name} of {_plural(schema['items'])}" if "items" in schema else name


def _plural(schema: Schema) -> str:
    name = f"{schema['type']}s"
    return f"{name} of {_plural(schema['items'])}" if "items" in schema else name


def _wrong(value: Any, expected: str, path: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} is {describe(value)}; it must be {expected}", param=path)
