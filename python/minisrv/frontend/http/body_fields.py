"""Reads the fields of a body by a table, the same way for every route."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import Request

from minisrv.frontend.fields.names import UnknownFields
from minisrv.frontend.fields.table import Field, Treatment, read_fields
from minisrv.frontend.http.body import read_json
from minisrv.frontend.http.context import context_of

logger = logging.getLogger("minisrv.frontend")

WARNINGS_HEADER = "X-Minisrv-Warnings"
Table = Mapping[str, Field]
FieldsAndHeaders = tuple[dict[str, Any], dict[str, str]]


def with_warnings(headers: Mapping[str, str], warnings: Iterable[str]) -> dict[str, str]:
    """The headers with `warnings` added to those that they have."""
    sentences = [*filter(None, [headers.get(WARNINGS_HEADER)]), *warnings]
    return {**headers, **({WARNINGS_HEADER: "; ".join(sentences)} if sentences else {})}


class BodyReader:
    """Reads bodies up to the size limit, and reports fields that no table names.

    count_ignored: called with the name of each field that is accepted and has no effect.
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
        self, request: Request, table: Table, *, required: bool = True
    ) -> FieldsAndHeaders:
        """The fields, and headers for the response. Raises InvalidRequestError naming the field.

        A missing body that is not required is an empty object.
        """
        return self._fields(await read_json(request, self._max_bytes, required=required), table)

    async def read_generation(self, request: Request, table: Table) -> FieldsAndHeaders:
        """As `read`; the body may set the request id, also for an error response."""
        body = await read_json(request, self._max_bytes)
        context_of(request.scope).take_id(body)
        return self._fields(body, table)

    def _fields(self, body: Any, table: Table) -> FieldsAndHeaders:
        fields, unknown = read_fields(body, table)
        for name in body.keys() & table.keys():
            if table[name].treatment is Treatment.IGNORED and body[name] is not None:
                logger.debug("request field %s has no effect", name)
                self._count_ignored(name)
        warning = self._unknown_fields.report(unknown)
        return fields, {WARNINGS_HEADER: warning} if warning else {}
