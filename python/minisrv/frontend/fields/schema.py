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
# By `type`: its name in a sentence, and the check.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "integer": ("an integer", lambda value: type(value) is int),
    "number": ("a number", lambda value: type(value) is int or type(value) is float),
    "string": ("a string", lambda value: isinstance(value, str)),
    "array": ("an array", lambda value: isinstance(value, list)),
    "object": ("an object", lambda value: isinstance(value, dict)),
}


def array_of(items: Schema) -> Schema:
    """An array whose items are all of one schema."""
    return {"type": "array", "items": items}


def any_of(*schemas: Schema) -> Schema:
    """One schema of several."""
    return {"anyOf": list(schemas)}


def one_of(*texts: str) -> Schema:
    """One string of several."""
    return {"type": "string", "enum": list(texts)}


def object_of(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    """An object with these properties, of which the `required` ones must be there."""
    return {"type": "object", "required": list(required), "properties": properties}


def between(low: float, high: float, schema: Schema = NUMBER) -> Schema:
    """A number from `low` to `high`."""
    return {**schema, "minimum": low, "maximum": high}


def check_value(value: Any, schema: Schema, path: str) -> None:
    """Raise InvalidRequestError, naming the dotted path, unless `value` fits `schema`.

    Strict: no string is a number, no boolean an integer. A null property counts as absent.
    """
    if "anyOf" in schema:
        return _check_any(value, schema["anyOf"], path)
    if "type" not in schema:
        return
    type_name, is_type = _TYPES[schema["type"]]
    if not is_type(value):
        raise _wrong(value, type_name, path)
    if "enum" in schema and value not in schema["enum"]:
        raise _wrong(value, "one of " + ", ".join(schema["enum"]), path)
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        raise _wrong(value, f"from {schema['minimum']} to {schema['maximum']}", path)
    if "minLength" in schema and not schema["minLength"] <= len(value) <= schema["maxLength"]:
        expected = f"{schema['minLength']} to {schema['maxLength']} characters long"
        raise _wrong(value, expected, path)
    if "items" in schema:
        _check_items(value, schema["items"], path)
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
    return json.dumps(value)


def _check_any(value: Any, schemas: list[Schema], path: str) -> None:
    errors = []
    for schema in schemas:
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


def _check_items(value: list[Any], items: Schema, path: str) -> None:
    if set(items) == {"type"}:  # a loop without calls of check_value: there may be 100,000 ids
        type_name, is_type = _TYPES[items["type"]]
        for i, item in enumerate(value):
            if not is_type(item):
                raise _wrong(item, type_name, f"{path}.{i}")
        return
    for i, item in enumerate(value):
        check_value(item, items, f"{path}.{i}")


def _name(schema: Schema) -> str:
    name = _TYPES[schema["type"]][0]
    return f"{name} of {_plural(schema['items'])}" if "items" in schema else name


def _plural(schema: Schema) -> str:
    name = f"{schema['type']}s"
    return f"{name} of {_plural(schema['items'])}" if "items" in schema else name


def _wrong(value: Any, expected: str, path: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} is {describe(value)}; it must be {expected}", param=path)
