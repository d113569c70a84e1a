"""The small part of JSON Schema that requests need: one description for the check and the docs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minisrv.errors import InvalidRequestError

Schema = Mapping[str, Any]

ANY: Schema = {}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}
INTEGERS: Schema = {"type": "array", "items": INTEGER}
STRINGS: Schema = {"type": "array", "items": STRING}

_MAX_SHOWN_CHARS = 60


def array_of(items: Schema) -> Schema:
    """An array whose items are all of one schema."""
    return {"type": "array", "items": items}


def any_of(*schemas: Schema) -> Schema:
    """One schema of several."""
    return {"anyOf": list(schemas)}


def object_of(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    """An object with these properties, of which the `required` ones must be there."""
    return {"type": "object", "required": list(required), "properties": properties}


def one_of(*texts: str) -> Schema:
    """One string of several."""
    return {"type": "string", "enum": list(texts)}


_IS_TYPE: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) is int or type(value) is float,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_TYPE_NAMES = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "array": "an array",
    "object": "an object",
}


def check_value(value: Any, schema: Schema, path: str) -> None:
    """Raise InvalidRequestError, naming the dotted path, unless `value` fits `schema`.

    Strict: no string is a number, no boolean an integer. A null property counts as absent.
    """
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], path)
        return
    kind = schema.get("type")
    if kind is None:
        return
    if not _IS_TYPE[kind](value):
        raise _wrong(value, _TYPE_NAMES[kind], path)
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(value, "one of " + ", ".join(schema["enum"]), path)
    if "items" in schema:
        _check_items(value, schema["items"], path)
    if kind == "object":
        _check_properties(value, schema, path)


def describe(value: Any) -> str:
    """A short ASCII form of a JSON value for a message."""
    if isinstance(value, dict | list) and value:
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, str) and len(value) > _MAX_SHOWN_CHARS:
        return f"a string of {len(value)} characters"
    return json.dumps(value)


def _check_any(value: Any, schemas: list[Schema], path: str) -> None:
    errors = []
    for schema in schemas:
        try:
            return check_value(value, schema, path)
        except InvalidRequestError as error:
            errors.append(error)
    inside = [error for error in errors if error.param != path]
    if not inside:
        raise _wrong(value, _names(schemas), path)
    # An error inside tells more than one about the whole; of several none is the whole truth.
    first = inside[0]
    if len(inside) > 1:
        found = first.message.rpartition("; it must be ")[0]
        first.message = f"{found or first.message}; {path} must be {_names(schemas)}"
    raise first


def _check_items(value: list[Any], items: Schema, path: str) -> None:
    if set(items) == {"type"}:
        is_type = _IS_TYPE[items["type"]]
        wrong = next((i for i, item in enumerate(value) if not is_type(item)), None)
        if wrong is not None:
            raise _wrong(value[wrong], _TYPE_NAMES[items["type"]], f"{path}.{wrong}")
        return
    for i, item in enumerate(value):
        check_value(item, items, f"{path}.{i}")


def _check_properties(value: dict[str, Any], schema: Schema, path: str) -> None:
    for name in schema.get("required", ()):
        if value.get(name) is None:
            raise InvalidRequestError(f"{path}.{name} is missing", param=f"{path}.{name}")
    for name, part in schema.get("properties", {}).items():
        if value.get(name) is not None:
            check_value(value[name], part, f"{path}.{name}")


def _names(schemas: list[Schema]) -> str:
    *names, last = dict.fromkeys(_name(schema) for schema in schemas)
    return f"{', '.join(names)} or {last}" if names else last


def _name(schema: Schema) -> str:
    kind: str = schema["type"]
    items = schema.get("items")
    return _TYPE_NAMES[kind] if items is None else f"{_TYPE_NAMES[kind]} of {_plural(items)}"


def _plural(schema: Schema) -> str:
    kind: str = schema["type"]
    items = schema.get("items")
    return f"{kind}s" if items is None else f"{kind}s of {_plural(items)}"


def _wrong(value: Any, expected: str, path: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} is {describe(value)}; it must be {expected}", param=path)
