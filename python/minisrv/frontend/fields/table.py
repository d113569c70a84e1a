"""Tables of request fields: how each field is treated, checked and described in /docs.

Names that no table has are reported to the client, not dropped.
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
    IGNORED = auto()  # accepted; has no effect
    REJECTED = auto()  # refused by name unless its value is null or neutral


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request.

    neutral: values of a rejected field that are accepted, since they ask for nothing. reason: why
    it is rejected, for the message. flag: the server option that makes the field a supported one.
    """

    treatment: Treatment
    schema: Schema
    neutral: tuple[Any, ...] = ()
    reason: str = ""
    flag: str | None = None


def supported(schema: Schema, description: str) -> Field:
    return Field(Treatment.SUPPORTED, Schema({**schema, "description": description}))


def ignored(reason: str = "it has no effect here") -> Field:
    return Field(Treatment.IGNORED, Schema(description=f"Accepted; {reason}."))


def rejected(*neutral: Any, reason: str = "") -> Field:
    return Field(Treatment.REJECTED, ANY, neutral, reason)


def read_fields(body: Any, table: Mapping[str, Field]) -> tuple[dict[str, Any], list[str]]:
    """The supported fields that are not null, checked; and the names that `table` does not have.

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
            if "properties" in field.schema:
                unknown += [
                    f"{name}.{part}" for part in value if part not in field.schema["properties"]
                ]
    return fields, unknown


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
    passing = ", ".join(json.dumps(neutral) for neutral in (*field.neutral, None))
    reason = f" ({field.reason})" if field.reason else ""
    sentence = f"is not supported by this server{reason}; leave it out (accepted: {passing})"
    if field.flag is not None:
        sentence = f"is not accepted by this server; it needs the server option {field.flag}"
    raise InvalidRequestError(f"{name} {sentence}", param=name, code="unsupported_parameter")
