"""The one wire form of a message: msgpack of [tag, epoch, field, ...].

A socket carries the types of its inbox table alone; the decoder goes by that table and by the types
of the fields, never by a name found in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from minisrv.errors import DecodeError
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DecodeMsg,
    DescribeMsg,
    DetokenizeMsg,
    EncodeMsg,
    FlushMsg,
    GenerateMsg,
    InboxTypes,
    Message,
    StatsMsg,
    TokenizeMsg,
    UserReply,
)

_TAGS: dict[type[Any], int] = {
    TokenizeMsg: 1,
    AbortMsg: 2,
    GenerateMsg: 3,
    DetokenizeMsg: 4,
    UserReply: 5,
    EncodeMsg: 6,
    DecodeMsg: 7,
    DescribeMsg: 8,
    FlushMsg: 9,
    AnswerMsg: 10,
    StatsMsg: 11,
}


def encode(message: Message) -> bytes:
    """The frame of a message."""
    frame = [_TAGS[type(message)], *_pack_fields(message)]
    return msgpack.packb(frame, use_bin_type=True)  # type: ignore[no-any-return]


def decode(frame: bytes, types: InboxTypes) -> Message:
    """The message in a frame. Raises DecodeError unless it is whole and one of `types`."""
    try:
        values = msgpack.unpackb(frame, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise DecodeError(f"a frame is not msgpack: {error}") from None
    kind = next((t for t in types if isinstance(values, list) and values[:1] == [_TAGS[t]]), None)
    if kind is None:
        raise DecodeError("a frame holds no message of this socket")
    message: Message = _unpack_fields(kind, values[1:])
    _check_columns(message)
    return message


def _check_columns(message: Message) -> None:
    if isinstance(message, DetokenizeMsg):
        lengths = {len(message.uids), len(message.token_ids), len(message.finishes)}
    elif isinstance(message, UserReply):
        lengths = {
            len(message.uids),
            len(message.texts),
            len(message.output_tokens),
            len(message.finishes),
            len(message.stop_reasons),
        }
    else:
        return
    if len(lengths) != 1:
        raise DecodeError(f"{type(message).__name__} has columns of different lengths")


def _pack_fields(value: Any) -> list[Any]:
    return [_pack(getattr(value, f.name)) for f in fields(value)]


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, tuple):
        return [_pack(item) for item in value]
    if is_dataclass(value):
        return _pack_fields(value)
    return value


def _unpack_fields(kind: type[Any], values: Any) -> Any:
    readers = _field_readers(kind)  # type: ignore[arg-type]
    if not isinstance(values, list) or len(values) != len(readers):
        raise DecodeError(f"{kind.__name__} does not have {len(readers)} fields")
    try:
        return kind(**{name: read(v) for (name, read), v in zip(readers, values, strict=True)})
    except (TypeError, ValueError) as error:
        raise DecodeError(f"{kind.__name__}: {error}") from None


@cache
def _field_readers(kind: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    hints = get_type_hints(kind)
    return tuple((f.name, _reader(hints[f.name])) for f in fields(kind))


def _reader(hint: Any) -> Callable[[Any], Any]:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _union_reader(get_args(hint))
    if origin is tuple:
        return _tuple_reader(_reader(get_args(hint)[0]))
    if origin is np.ndarray:
        dtype = np.dtype(get_args(get_args(hint)[1])[0])
        return lambda value: np.frombuffer(_expect(value, bytes), dtype)
    if origin is dict:
        return lambda value: _expect(value, dict)
    if is_dataclass(hint):
        return lambda value: _unpack_fields(hint, value)  # type: ignore[arg-type]
    if hint is float:
        return lambda value: float(_expect(value, float, int))
    return lambda value: _expect(value, hint)


def _tuple_reader(read_item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: tuple(read_item(item) for item in _expect(value, list))


def _union_reader(hints: Sequence[Any]) -> Callable[[Any], Any]:
    readers = [_reader(hint) for hint in hints if hint is not NoneType]

    def read(value: Any) -> Any:
        if value is None and NoneType in hints:
            return None
        for reader in readers:
            try:
                return reader(value)
            except TypeError:
                continue
        raise TypeError(f"a {type(value).__name__} is not one of {hints}")

    return read


def _expect(value: Any, *kinds: type[Any]) -> Any:
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return value
    raise TypeError(f"a {type(value).__name__} is not a {kinds[0].__name__}")
