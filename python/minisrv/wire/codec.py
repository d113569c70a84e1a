"""The wire form of a message: a frame is msgpack of [tag, epoch, field, ...].

Arrays travel as bytes, dataclasses as lists of their fields, integers that do not fit 64 bits as an
extension type. The decoder follows the types that the receiving socket accepts and the annotations
of their fields, never a name found in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack
import numpy as np

from minisrv.errors import DecodeError, InvalidRequestError, OtherEpochError
from minisrv.wire.messages import DetokenizeMsg, InboxTypes, Message, UserReply

_TAGS: dict[type[Any], int] = {kind: tag for tag, kind in enumerate(get_args(Message), 1)}
_COPIED_BYTES = 1 << 20  # a larger frame is not copied, for that costs as much as to pack it
_BIG_INTEGER = 1  # the code of the extension type; its bytes are little-endian and signed
_COLUMNS = {
    DetokenizeMsg: ("uids", "token_ids", "finishes"),
    UserReply: ("uids", "texts", "output_tokens", "finishes", "stop_reasons"),
}


def encode(message: Message, epoch: int = 0) -> bytes | memoryview:
    """The frame of a message; `epoch` counts the starts of the processes that exchange it."""
    packer = msgpack.Packer(default=_pack, autoreset=False)
    packer.pack([_TAGS[type(message)], epoch, *_field_values(message)])
    frame: memoryview = packer.getbuffer()
    return bytes(frame) if len(frame) <= _COPIED_BYTES else frame


def decode(frame: bytes | memoryview, types: InboxTypes, epoch: int = 0) -> Message:
    """The message in a frame.

    Raises DecodeError unless the frame is of this epoch and holds a whole message of `types`; the
    error is an OtherEpochError if only the epoch is another one.
    """
    try:
        values = msgpack.unpackb(frame, ext_hook=_unpack_extension)
    except (ValueError, msgpack.UnpackException) as error:
        raise DecodeError(f"the frame is not msgpack: {error}") from None
    if not isinstance(values, list) or len(values) < 2:
        raise DecodeError("the frame holds no message")
    kind = next((kind for kind in types if _TAGS[kind] == values[0]), None)
    if kind is None:
        raise DecodeError("the frame holds no message that this socket accepts")
    if type(values[1]) is not int:
        raise DecodeError("the frame has no epoch")
    if values[1] != epoch:
        raise OtherEpochError(
            f"the frame is of epoch {values[1]}; this is epoch {epoch}", values[1]
        )
    message: Message = _unpack_fields(kind, values[2:])
    if len({len(getattr(message, name)) for name in _COLUMNS.get(kind, ())}) > 1:
        raise DecodeError(f"{kind.__name__} has columns of different lengths")
    return message


def _pack(value: Any) -> Any:
    """What msgpack packs in place of a type that it does not know."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return msgpack.ExtType(_BIG_INTEGER, data)
    return _field_values(value)


def _unpack_extension(code: int, data: bytes) -> int:
    if code != _BIG_INTEGER:
        raise ValueError(f"unknown extension type {code}")
    return int.from_bytes(data, "little", signed=True)


def _field_values(value: Any) -> list[Any]:
    readers = _field_readers(type(value))  # type: ignore[arg-type]
    return [getattr(value, name) for name, _ in readers]


def _unpack_fields(kind: Any, values: Any) -> Any:
    readers = _field_readers(kind)
    if not isinstance(values, list) or len(values) != len(readers):
        raise DecodeError(f"{kind.__name__} does not have {len(readers)} fields")
    try:
        return kind(**{name: read(v) for (name, read), v in zip(readers, values, strict=True)})
    except (TypeError, ValueError, InvalidRequestError) as error:
        raise DecodeError(f"{kind.__name__}: {error}") from None


@cache
def _field_readers(kind: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    """The fields of a dataclass, each with the function that reads what msgpack made of it."""
    hints = get_type_hints(kind)
    return tuple((f.name, _reader(hints[f.name])) for f in fields(kind))


def _reader(hint: Any) -> Callable[[Any], Any]:
    if kinds := _plain_types(hint):
        return lambda value: _expect(value, kinds)
    origin = get_origin(hint)
    if origin is UnionType:
        return _union_reader(get_args(hint))
    if origin is tuple:
        return _tuple_reader(get_args(hint)[0])
    if origin is np.ndarray:
        dtype = np.dtype(get_args(get_args(hint)[1])[0])
        return lambda value: np.frombuffer(_expect(value, {bytes}), dtype)
    if is_dataclass(hint):
        return lambda value: _unpack_fields(hint, value)
    assert hint is float, hint
    return lambda value: float(_expect(value, {float, int}))


def _plain_types(hint: Any) -> set[type[Any]]:
    """The types of a value that needs no conversion, none if it needs one."""
    hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = {get_origin(one) or one for one in hints}
    return kinds if kinds <= {str, int, bool, bytes, dict, NoneType} else set()


def _tuple_reader(item: Any) -> Callable[[Any], Any]:
    if kinds := _plain_types(item):
        return lambda value: tuple(_expect_items(value, kinds))
    read_item = _reader(item)
    return lambda value: tuple([read_item(one) for one in _expect(value, {list})])


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


def _expect(value: Any, kinds: set[type[Any]]) -> Any:
    if type(value) not in kinds:  # exactly: a bool is not an int here
        raise TypeError(f"a {type(value).__name__} is not one of {kinds}")
    return value


def _expect_items(values: Any, kinds: set[type[Any]]) -> Any:
    if not kinds.issuperset(map(type, _expect(values, {list}))):
        raise TypeError(f"a list has items that are not of {kinds}")
    return values
