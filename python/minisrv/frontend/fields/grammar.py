"""Reads the fields that constrain the text, under all their names, as one Grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.schema import (
    ANY,
    BOOLEAN,
    OBJECT,
    STRING,
    STRINGS,
    any_of,
    check_value,
    object_of,
    one_of,
)
from minisrv.sampling_params import Grammar

_Read = Callable[[Any, str], Grammar]

JSON_SCHEMA = any_of(OBJECT, STRING, BOOLEAN)
_SCHEMA = any_of(OBJECT, BOOLEAN)
RESPONSE_FORMAT = object_of(
    ["type"],
    type=one_of("text", "json_object", "json_schema"),
    json_schema=object_of(
        ["name", "schema"], name=STRING, description=STRING, schema=_SCHEMA, strict=BOOLEAN
    ),
    schema=_SCHEMA,
)
STRUCTURED_OUTPUTS = object_of(
    json=JSON_SCHEMA,
    json_object=BOOLEAN,
    regex=STRING,
    choice=STRINGS,
    grammar=STRING,
    structural_tag=ANY,
    whitespace_pattern=ANY,
    disable_any_whitespace=BOOLEAN,
    disable_additional_properties=ANY,
)
_PARTS: dict[str, _Read] = {
    "json": Grammar.json_schema,
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": Grammar.lark,
}
_READERS: dict[str, _Read] = {
    **{f"guided_{name}": read for name, read in _PARTS.items()},
    "regex": Grammar.regex,
    "json_schema": Grammar.json_schema,
    "ebnf": Grammar.lark,
    "grammar": Grammar.lark,
}


def read_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar of the text. Raises InvalidRequestError, also for two such fields."""
    found = [read(fields[name], name) for name, read in _READERS.items() if name in fields]
    found += _read_structured_outputs(fields.get("structured_outputs", {}))
    found += _read_response_format(fields.get("response_format", {"type": "text"}))
    if len(found) > 1:
        raise InvalidRequestError(
            f"{found[1].param} cannot be combined with {found[0].param}; send one of them",
            param=found[1].param,
        )
    return found[0] if found else None


def _read_structured_outputs(value: dict[str, Any]) -> list[Grammar]:
    path = "structured_outputs"
    found = []
    for name, part in value.items():
        if part is None:
            continue
        if name in _PARTS:
            found.append(_PARTS[name](part, f"{path}.{name}"))
        elif name == "json_object":
            found += [Grammar.json_object(f"{path}.{name}")] if part else []
        elif part is not False and name != "disable_any_whitespace":  # nothing to disable
            shown = f"{path}.{name[:64]}"
            raise InvalidRequestError(
                f"{shown} is not supported by this server; leave it out",
                param=shown,
                code="unsupported_parameter",
            )
    if value and not found:
        raise InvalidRequestError(f"{path} has no constraint", param=path)
    return found


def _read_response_format(value: dict[str, Any]) -> list[Grammar]:
    path = "response_format"
    if value["type"] == "text":
        return []
    if value["type"] == "json_object":
        schema = value.get("schema")
        if schema is not None:
            return [Grammar.json_schema(schema, f"{path}.schema")]
        return [Grammar.json_object(path)]
    check_value(value, object_of(["json_schema"]), path)
    return [Grammar.json_schema(value["json_schema"]["schema"], f"{path}.json_schema.schema")]
