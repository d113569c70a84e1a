"""The fields of a request, once: what is done with each, its check and its place in /docs.

A field is supported, harmless (accepted; changes nothing here) or unsupported: refused by name
unless its value is null or asks for nothing. Names that no table holds are reported, not dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.schema import ANY, Schema, check_value, describe


class Treatment(Enum):
    """What the server does with a field."""

    SUPPORTED = auto()
    IGNORED = auto()
    REJECTED = auto()


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request.

    neutral: values of a rejected field that pass. reason: why it is rejected, for the message.
    flag: the server option that makes a rejected field a supported one.
    """

    treatment: Treatment
    schema: Schema
    neutral: tuple[Any, ...] = ()
    reason: str = ""
    flag: str | None = None


def supported(schema: Schema, description: str) -> Field:
    """A field that the server supports."""
    return Field(Treatment.SUPPORTED, {**schema, "description": description})


def ignored(reason: str = "it has no effect here") -> Field:
    """A field that is accepted and does nothing."""
    return Field(Treatment.IGNORED, {**ANY, "description": f"Accepted; {reason}."})


def rejected(*neutral: Any, reason: str = "") -> Field:
    """A field that is refused by name, unless its value is null or one of `neutral`."""
    return Field(Treatment.REJECTED, ANY, neutral, reason)


def read_fields(body: Any, table: Mapping[str, Field]) -> tuple[dict[str, Any], list[str]]:
    """The supported fields that are not null, checked; and the names that `table` does not hold.

    Raises InvalidRequestError naming the field.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body is {describe(body)}; it must be an object")
    fields: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            unknown.append(name)
        elif value is None or field.treatment is Treatment.IGNORED:
            continue
        elif field.treatment is Treatment.REJECTED:
            _check_neutral(name, value, field)
        else:
            check_value(value, field.schema, name)
            fields[name] = value
            unknown += _unknown_properties(name, value, field.schema)
    return fields, unknown


def _unknown_properties(name: str, value: Any, schema: Schema) -> list[str]:
    if "properties" not in schema:
        return []
    return [f"{name}.{part}" for part in value if part not in schema["properties"]]


def request_schema(table: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of a body, for /docs; rejected fields are left out."""
    return {
        "type": "object",
        "properties": {
            name: field.schema
            for name, field in table.items()
            if field.treatment is not Treatment.REJECTED
        },
    }


def _check_neutral(name: str, value: Any, field: Field) -> None:
    for neutral in field.neutral:
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
            return
    if field.flag is not None:
        raise InvalidRequestError(
            f"{name} is not accepted by this server; it needs the server option {field.flag}",
            param=name,
            code="unsupported_parameter",
        )
    passing = ", ".join(json.dumps(neutral) for neutral in (*field.neutral, None))
    reason = f" ({field.reason})" if field.reason else ""
    raise InvalidRequestError(
        f"{name} is not supported by this server{reason}; leave it out (accepted: {passing})",
        param=name,
        code="unsupported_parameter",
    )
