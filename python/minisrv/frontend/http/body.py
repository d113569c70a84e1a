"""Reads the JSON body of a request, bounded in size, values, depth and time, by a table of fields.

Numbers must be finite doubles or integers that Python reads, keys in an object must be unique and
strings must be Unicode. Whatever passes can be written as JSON or packed for another process.
No part of the work holds the event loop for more than some 30 ms: other streams go on in between.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jiter
from starlette.requests import ClientDisconnect, Request

from minisrv.errors import InvalidRequestError, RequestTooLargeError
from minisrv.frontend.fields.names import UnknownFields
from minisrv.frontend.fields.table import Field, Treatment, read_fields
from minisrv.frontend.http.body_size import PIECE_BYTES, BodySize
from minisrv.frontend.http.context import RequestContext, context_of
from minisrv.frontend.http.gzip_body import CODINGS, GzipBody

logger = logging.getLogger("minisrv.frontend")

Table = Mapping[str, Field]
Fields = dict[str, Any]

MAX_DEPTH = 64
BODY_TIMEOUT_S = 60.0
_SCALARS = {str, int, bool, type(None)}


class BodyReader:
    """Reads bodies up to the size limit, and reports fields that no table has.

    count_ignored: called with the name of each field that is accepted and has no effect.
    """

    def __init__(
        self, max_bytes: int, unknown_fields: UnknownFields, count_ignored: Callable[[str], None]
    ) -> None:
        self._max_bytes = max_bytes
        self._unknown_fields = unknown_fields
        self._count_ignored = count_ignored

    async def read(self, request: Request, table: Table, *, required: bool = True) -> Fields:
        """The supported fields of a body. One that is not required may be missing.

        Raises InvalidRequestError naming the field, RequestTooLargeError or ClientDisconnect.
        """
        data = await self._data(request, required)
        body = await _parse(data) if data or required else {}
        return await self._fields(data, body, table, context_of(request.scope))

    async def read_generation(self, request: Request, table: Table) -> Fields:
        """As `read`; the body may set the request id, also for an error response."""
        data, context = await self._data(request, required=True), context_of(request.scope)
        body = await _parse(data)
        context.take_id(body)
        return await self._fields(data, body, table, context)

    async def _data(self, request: Request, required: bool) -> bytes:
        if required:
            _check_content_type(request)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                data = await _read_body(request, self._max_bytes)
        except TimeoutError:
            sentence = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            raise InvalidRequestError(sentence, status=408) from None
        if data or required:
            _check_content_type(request)
        return data

    async def _fields(
        self, data: bytes, body: Any, table: Table, context: RequestContext
    ) -> Fields:
        fields, unknown = read_fields(body, table)
        for name in body.keys() & table.keys():
            if table[name].treatment is Treatment.IGNORED and body[name] is not None:
                logger.debug("request field %s has no effect", name)
                self._count_ignored(name)
        context.warnings += self._unknown_fields.report(unknown)
        await _let_others_run(data)
        return fields


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises InvalidRequestError."""
    value = _parse_text(data)
    _check_value(value)
    return value


async def _parse(data: bytes) -> Any:
    """As parse_json, in steps."""
    await _let_others_run(data)
    value = _parse_text(data)
    await _let_others_run(data)
    _check_value(value)
    await _let_others_run(data)
    return value


async def _let_others_run(data: bytes) -> None:
    """Give way to other requests if the work on this body takes long."""
    if len(data) > PIECE_BYTES:
        await asyncio.sleep(0)


def _check_content_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        sentence = "the body must be sent with Content-Type: application/json"
        raise InvalidRequestError(sentence, status=415)
    coding = request.headers.get("content-encoding", "").strip()
    if coding.lower() not in ("", "identity", *CODINGS):
        sentence = f"Content-Encoding {coding[:40]!a} is not supported; send gzip or plain JSON"
        raise InvalidRequestError(sentence, status=415)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The body, inflated if it was compressed; it may have max_bytes as sent and as inflated."""
    coding = request.headers.get("content-encoding", "").strip().lower()
    gzip = GzipBody() if coding in CODINGS else None
    announced = request.headers.get("content-length", "")
    num_bytes = int(announced) if announced.isdecimal() else 0
    data, size, num_counted, num_sent = bytearray(), BodySize(), 0, 0
    more = True
    while more and num_bytes <= max_bytes:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        sent = message.get("body", b"")
        num_sent += len(sent)
        more = message.get("more_body", False)
        for piece in gzip.inflate(sent) if gzip else (sent,):
            data += piece
            # What is refused is still received: a client that sends may not see an early answer.
            while size.fits and num_counted + PIECE_BYTES < len(data):
                size.add(data[num_counted : num_counted + PIECE_BYTES])
                num_counted += PIECE_BYTES
                await asyncio.sleep(0)
            if len(data) > max_bytes:
                break
        num_bytes = max(num_sent, len(data))
    if num_bytes > max_bytes:
        raise RequestTooLargeError(
            f"the body has more than {max_bytes} bytes, the limit; send less or raise "
            "--max-body-bytes"
        )
    if gzip and num_sent:
        gzip.end()
    if num_counted and size.fits:
        size.add(data[num_counted:])
    size.check()
    return bytes(data)


def _parse_text(data: bytes) -> Any:
    try:
        return jiter.from_json(
            data, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="keys"
        )
    except ValueError as error:
        raise _not_json(str(error)) from None


def _not_json(problem: str) -> InvalidRequestError:
    """The error for what the parser reports."""
    if problem.startswith("recursion limit exceeded"):
        return _too_deep()
    if problem.startswith("number out of range"):
        digits = sys.get_int_max_str_digits()
        return InvalidRequestError(f"the body has an integer of more than {digits} digits")
    if twice := re.fullmatch(r'Detected duplicate key "(.*)" at (.*)', problem, re.DOTALL):
        return InvalidRequestError(
            f"the body has the key {twice[1][:40]!a} twice in one object, {twice[2]}"
        )
    if "hex escape" in problem:
        problem += "; a lone surrogate (\\ud800 to \\udfff) is not a character"
    return InvalidRequestError(f"the body is not JSON: {problem}")


def _check_value(value: Any) -> None:
    """Raise InvalidRequestError for a value that is nested too deeply or has an infinite number."""
    if isinstance(value, dict | list) and (path := _find_infinite(value, 1)):
        name = ".".join(str(part)[:64] for part in reversed(path))
        raise InvalidRequestError(f"{name} is outside the range of a double", param=name)


def _find_infinite(value: dict[str, Any] | list[Any], depth: int) -> list[str | int] | None:
    """The path to a number that a double cannot hold, innermost name first."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if type(value) is list and _SCALARS.issuperset(map(type, value)):  # maybe many token ids
        return None
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        kind = type(part)
        if kind is dict or kind is list:
            if (path := _find_infinite(part, depth + 1)) is not None:
                return [*path, name]
        elif kind is float and math.isinf(part):
            return [name]
    return None


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
