"""Which types of JSON a schema allows: what a value is that stands as bare text between tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALL_TYPES = frozenset({"string", "number", "boolean", "null", "object", "array"})
_MAX_REFERENCES = 16  # one after the other; there may be a circle


def resolve(schema: Any, root: Any) -> Any:
    """The schema that `schema` stands for: its references within `root` are followed."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        others = {key: value for key, value in schema.items() if key != "$ref"}
        target = _find(root, schema["$ref"])
        if not isinstance(target, Mapping):
            return others
        schema = {**target, **others}
    return schema


def types_of(schema: Any, root: Any) -> frozenset[str]:
    """The types that `schema`, a part of `root`, allows at most; integers count as numbers.

    A schema without types, or whose types exclude each other, allows all.
    """
    return _types_of(schema, root, set()) or ALL_TYPES


def type_of(value: Any) -> str:
    """The type of a decoded value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def property_schema(root: Any, name: str) -> Any:
    """The schema of the property `name` of an object under `root`; True if there is none."""
    resolved = resolve(root, root)
    if not isinstance(resolved, Mapping):
        return True
    properties = resolved.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return resolved.get("additionalProperties", True)


def _types_of(schema: Any, root: Any, seen: set[int]) -> frozenset[str]:
    """As types_of, or nothing where they exclude each other, and for a part that was `seen`."""
    if id(schema) in seen:
        return frozenset()
    seen.add(id(schema))
    schema = resolve(schema, root)
    if not isinstance(schema, Mapping):
        return ALL_TYPES
    types = _named(schema.get("type"))
    if schema.get("nullable") is True:
        types |= {"null"}
    if "const" in schema:
        types &= {type_of(schema["const"])}
    if isinstance(schema.get("enum"), list):
        types &= {type_of(value) for value in schema["enum"]}
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            types &= frozenset().union(*(_types_of(part, root, seen) for part in schema[name]))
    if isinstance(schema.get("allOf"), list):
        for part in schema["allOf"]:
            types &= _types_of(part, root, seen) or ALL_TYPES
    return types


def _named(names: Any) -> frozenset[str]:
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list):
        return ALL_TYPES
    known = {name for name in listed if isinstance(name, str)}
    return ALL_TYPES & (known | {"number"} if "integer" in known else known)


def _find(root: Any, pointer: str) -> Any:
    if not pointer.startswith("#"):
        return None
    for part in pointer[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(root, Mapping) or key not in root:
            return None
        root = root[key]
    return root
