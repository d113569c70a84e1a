"""From a request's body to the fields of a table, the same way for every route."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request

from minisrv.frontend.http_body import read_json
from minisrv.frontend.openai_types import Field, Treatment, read_fields
from minisrv.frontend.schema import Schema
from minisrv.frontend.unknown_fields import UnknownFields

WARNINGS_HEADER = "X-Minisrv-Warnings"


def honoured(schema: Schema, description: str) -> Field:
    """A field that does something."""
    return Field(Treatment.HONOURED, {**schema, "description": description})


def with_warnings(headers: dict[str, str], warnings: Iterable[str]) -> dict[str, str]:
    """The headers of a response that tells these as well."""
    told = [*([headers[WARNINGS_HEADER]] if WARNINGS_HEADER in headers else []), *warnings]
    return {**headers, WARNINGS_HEADER: "; ".join(told)} if told else headers


class BodyFields:
    """Reads bodies within the server's limit, and reports what no table names."""

    def __init__(self, max_bytes: int, unknown_fields: UnknownFields) -> None:
        self._max_bytes = max_bytes
        self._unknown_fields = unknown_fields

    async def read(
        self, request: Request, table: Mapping[str, Field]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The fields, and headers for the response. Raises InvalidRequestError naming the field."""
        body = await read_json(request, self._max_bytes)
        fields, unknown = read_fields(body, table)
        warning = self._unknown_fields.report(unknown)
        return fields, {WARNINGS_HEADER: warning} if warning else {}
