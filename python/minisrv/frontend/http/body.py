"""Reads the JSON body of a request, bounded in size, depth and time, by a table of fields.

Integers must fit 64 bits, other numbers must be finite doubles, keys in an object must be unique
and strings must be Unicode. Whatever passes can be written as JSON or packed for another process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request

from minisrv.errors import InvalidRequestError, RequestTooLargeError
from minisrv.frontend.fields.names import UnknownFields
from minisrv.frontend.fields.table import Field, Treatment, read_fields
from minisrv.frontend.http.context import RequestContext, context_of

logger = logging.getLogger("minisrv.frontend")

Table = Mapping[str, Field]
Fields = dict[str, Any]

MAX_DEPTH = 64
BODY_TIMEOUT_S = 60.0
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**63 - 1


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
        return self._fields(await self._json(request, required), table, context_of(request.scope))

    async def read_generation(self, request: Request, table: Table) -> Fields:
        """As `read`; the body may set the request id, also for an error response."""
        body, context = await self._json(request, required=True), context_of(request.scope)
        context.take_id(body)
        return self._fields(body, table, context)

    async def _json(self, request: Request, required: bool) -> Any:
        if required:
            _check_content_type(request)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read_body(request, self._max_bytes)
        except TimeoutError:
            sentence = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            raise InvalidRequestError(sentence, status=408) from None
        if not body and not required:
            return {}
        _check_content_type(request)
        return parse_json(body)

    def _fields(self, body: Any, table: Table, context: RequestContext) -> Fields:
        fields, unknown = read_fields(body, table)
        for name in body.keys() & table.keys():
            if table[name].treatment is Treatment.IGNORED and body[name] is not None:
                logger.debug("request field %s has no effect", name)
                self._count_ignored(name)
        context.warnings += self._unknown_fields.report(unknown)
        return fields


def parse_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8; numbers outside arrays and objects may have any size.

    Raises InvalidRequestError.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            # Python refuses to convert many digits. What is cut off here is refused below.
            parse_int=lambda digits: int(digits[:25]),
            object_pairs_hook=_parse_object,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise InvalidRequestError(f"the body is not JSON: {error.msg}, {place}") from None
    except RecursionError:
        raise _too_deep() from None
    if isinstance(value, dict | list):
        _check_parts(value, "", 1)
    return value


def _check_content_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        sentence = "the body must be sent with Content-Type: application/json"
        raise InvalidRequestError(sentence, status=415)
    coding = request.headers.get("content-encoding", "").strip()
    if coding.lower() not in ("", "identity"):
        sentence = f"Content-Encoding {coding[:40]!a} is not supported; send plain JSON"
        raise InvalidRequestError(sentence, status=415)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    num_bytes = int(announced) if announced.isdecimal() else 0
    chunks: list[bytes] = []
    more = True
    while more and num_bytes <= max_bytes:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        num_bytes = len(message.get("body", b"")) + (num_bytes if chunks else 0)
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    if num_bytes > max_bytes:
        raise RequestTooLargeError(
            f"the body has more than {max_bytes} bytes, the limit; send less or raise "
            "--max-body-bytes"
        )
    return b"".join(chunks)


def _refuse_constant(name: str) -> Any:
    raise InvalidRequestError(f"the body is not JSON: {name} is not a JSON number")


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InvalidRequestError(f"the body has the key {twice[:40]!a} twice in one object")
    return value


def _check_parts(value: Any, path: str, depth: int) -> None:
    """Raise InvalidRequestError for a part that is refused; `path` is empty or ends with a dot."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, dict):
        for name in value:
            _check_text(name)
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        kind = type(part)
        if kind is str:
            _check_text(part)
        elif kind is dict or kind is list:
            _check_parts(part, f"{path}{str(name)[:64]}.", depth + 1)
        elif kind is int and not _MIN_INTEGER <= part <= _MAX_INTEGER:
            raise _wrong_number(f"{path}{str(name)[:64]}", "an integer that does not fit 64 bits")
        elif kind is float and not math.isfinite(part):
            raise _wrong_number(f"{path}{str(name)[:64]}", "outside the range of a double")


def _wrong_number(path: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} is {what}", param=path)


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "the body contains a lone surrogate (\\ud800 to \\udfff), which is not a character"
        ) from None


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the body is nested deeper than {MAX_DEPTH} levels")
