"""Reads the JSON body of a request, bounded in size, depth and time.

Integers must fit 64 bits, other numbers must be finite doubles, keys in an object must be unique
and strings must be Unicode. Whatever passes can be written as JSON or packed for another process.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request

from minisrv.errors import InvalidRequestError, RequestTooLargeError

MAX_DEPTH = 64
BODY_TIMEOUT_S = 60.0
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**63 - 1


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body's value. Raises InvalidRequestError, RequestTooLargeError or ClientDisconnect."""
    _check_kind(request)
    return parse_json(await _read_in_time(request, max_bytes))


async def read_optional_json(request: Request, max_bytes: int) -> Any:
    """The body's value, or an empty object if there is no body. Raises as `read_json`."""
    body = await _read_in_time(request, max_bytes)
    if not body:
        return {}
    _check_kind(request)
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises InvalidRequestError."""
    too_wide: list[int] = []
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=partial(_parse_integer, too_wide),
            parse_float=_parse_float,
            object_pairs_hook=_parse_object,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise InvalidRequestError(f"the body is not JSON: {error.msg}, {place}") from None
    except RecursionError:
        raise _too_deep() from None
    _check_text_and_depth(value)
    if too_wide:
        raise _too_wide(_path_to(too_wide[0], value))
    return value


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _rejected("the body must come with Content-Type: application/json")
    coding = request.headers.get("content-encoding", "").strip()
    if coding.lower() not in ("", "identity"):
        raise _rejected(f"Content-Encoding {coding[:40]!a} is not supported; send plain JSON")


def _rejected(sentence: str) -> InvalidRequestError:
    return InvalidRequestError(sentence, status=415)


async def _read_in_time(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read_body(request, max_bytes)
    except TimeoutError:
        raise InvalidRequestError(
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s", status=408
        ) from None


async def _read_body(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        num_bytes += len(chunks[-1])
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body has more than {max_bytes} bytes, the limit; send less or raise --max-body-bytes"
    )


def _refuse_constant(name: str) -> Any:
    raise InvalidRequestError(f"the body is not JSON: {name} is not a JSON number")


def _parse_integer(too_wide: list[int], digits: str) -> int:
    """The integer; one that does not fit goes to `too_wide`, since its field is not known yet."""
    value = int(digits) if len(digits) <= 20 else _MAX_INTEGER + 1
    if not _MIN_INTEGER <= value <= _MAX_INTEGER:
        too_wide.append(value)
    return value


def _path_to(wanted: Any, item: Any) -> str | None:
    """The dotted path in `item` of the very object `wanted`, None if it is not there."""
    if item is wanted:
        return ""
    parts = item.items() if isinstance(item, dict) else enumerate(item)
    for name, part in parts:
        if not isinstance(part, dict | list) and part is not wanted:
            continue
        path = _path_to(wanted, part)
        if path is not None:
            return f"{str(name)[:64]}.{path}".removesuffix(".")
    return None


def _too_wide(path: str | None) -> InvalidRequestError:
    return InvalidRequestError(
        f"{path or 'the body'} is an integer that does not fit 64 bits", param=path or None
    )


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidRequestError("the body contains a number outside the range of a double")
    return value


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InvalidRequestError(f"the body has the key {twice[:40]!a} twice in one object")
    return value


def _check_text_and_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise _too_deep()


def _children(item: Any) -> Iterator[Any]:
    """The parts of `item` that can hold text."""
    if isinstance(item, str):
        _check_text(item)
    elif isinstance(item, dict):
        for name in item:
            _check_text(name)
        yield from item.values()
    elif isinstance(item, list):
        yield from (part for part in item if isinstance(part, str | dict | list))


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
