"""From a request's body to the fields of a table, the same way for every route."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import Request

from minisrv.frontend.fields.schema import Schema
from minisrv.frontend.fields.table import Field, Treatment, read_fields
from minisrv.frontend.fields.unknown import UnknownFields
from minisrv.frontend.http.body import read_json, read_optional_json
from minisrv.frontend.http.context import context_of

logger = logging.getLogger("minisrv.frontend")

WARNINGS_HEADER = "X-Minisrv-Warnings"


def supported(schema: Schema, description: str) -> Field:
    """A field that does something."""
    return Field(Treatment.SUPPORTED, {**schema, "description": description})


def with_warnings(headers: dict[str, str], warnings: Iterable[str]) -> dict[str, str]:
    """The headers of a response that tells these as well."""
    told = [*([headers[WARNINGS_HEADER]] if WARNINGS_HEADER in headers else []), *warnings]
    return {**headers, WARNINGS_HEADER: "; ".join(told)} if told else headers


class BodyFields:
    """Reads bodies within the server's limit, and reports what no table names.

    count_ignored: is told each field that is accepted and changes nothing.
    """

    def __init__(
        self,
        max_bytes: int,
        unknown_fields: UnknownFields,
        count_ignored: Callable[[str], None],
    ) -> None:
        self._max_bytes = max_bytes
        self._unknown_fields = unknown_fields
        self._count_ignored = count_ignored

    async def read(
        self, request: Request, table: Mapping[str, Field]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The fields, and headers for the response. Raises InvalidRequestError naming the field."""
        return self._read(await read_json(request, self._max_bytes), table)

    async def read_optional(
        self, request: Request, table: Mapping[str, Field]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """As `read`, for a body that may be missing."""
        return self._read(await read_optional_json(request, self._max_bytes), table)

    async def read_generation(
        self, request: Request, table: Mapping[str, Field]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """As `read`; a body that names its request names the refusal of it too."""
        body = await read_json(request, self._max_bytes)
        context_of(request.scope).take_id(body)
        return self._read(body, table)

    def _read(self, body: Any, table: Mapping[str, Field]) -> tuple[dict[str, Any], dict[str, str]]:
        fields, unknown = read_fields(body, table)
        for name in body.keys() & table.keys():
            if table[name].treatment is Treatment.IGNORED and body[name] is not None:
                logger.debug("request field %s changes nothing", name)
                self._count_ignored(name)
        warning = self._unknown_fields.report(unknown)
        return fields, {WARNINGS_HEADER: warning} if warning else {}
