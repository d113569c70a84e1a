"""The contents of GGUF files: metadata and tensors, memory-mapped.

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian: a header, the metadata,
the names, shapes, types and places of the tensors, and their data. The package `gguf` defines the
types. Its own reader makes several arrays for each token of the vocabulary, which takes seconds,
and believes the file: here every count and size is compared with the size of the file before
anything is made of it. Like llama.cpp, this reader wants the tensors one behind the other.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from numpy.typing import NDArray

from minisrv.checkpoint.gguf.files import MAGIC, find_gguf
from minisrv.errors import ConfigError

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_HEADER = struct.Struct("<4sI")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_LEAST_TENSOR_BYTES = 32  # an empty name, one dimension, the type and the offset
_LEAST_ENTRY_BYTES = 13  # an empty key, the type and a byte


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """shape: the rows come first, as in torch. start: of the data in the file, in bytes."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array in the metadata that is decoded when it is asked for.

    text: the text at a place, of an array of texts.
    """

    count: int
    decode: Callable[[], list[Any]]
    text: Callable[[int], bytes] | None = None


class GgufCheckpoint:
    """One model: a GGUF file, or several that it was split into.

    name: of the first file, for messages.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises ConfigError for a file that is not GGUF, is cut off or contradicts itself."""
        self.name = paths[0].name
        files = [_GgufFile(path) for path in paths]
        self._metadata = files[0].metadata
        self.tensors: dict[str, GgufTensor] = {}
        for number, file in enumerate(files):
            if repeated := self.tensors.keys() & file.tensors.keys():
                raise ConfigError(f"{file.path} has {min(repeated)} again")
            self._check_split(file, number, len(files))
            self.tensors |= file.tensors
        total = self._metadata.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise ConfigError(f"{self.name} is of {total} tensors; there are {len(self.tensors)}")
        self._maps = {file.path: file.contents for file in files}

    @property
    def keys(self) -> list[str]:
        """The keys of the metadata."""
        return list(self._metadata)

    def value(self, key: str) -> Any:
        """The value of a key, None if there is none."""
        value = self._metadata.get(key)
        return value.decode() if isinstance(value, _Array) else value

    @overload
    def get(self, key: str, kind: type[bool]) -> bool | None: ...
    @overload
    def get(self, key: str, kind: type[int]) -> int | None: ...
    @overload
    def get(self, key: str, kind: type[float]) -> float | None: ...
    @overload
    def get(self, key: str, kind: type[str]) -> str | None: ...
    @overload
    def get(self, key: str, kind: type[list[Any]]) -> list[Any] | None: ...

    def get(self, key: str, kind: type[Any]) -> Any:
        """The value of a key, None if there is none. Raises ConfigError if it is not a `kind`."""
        value = self.value(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not None and type(value) is not kind:
            raise ConfigError(f"{self.name} has {key} {_shown(value)}, not of type {kind.__name__}")
        return value

    def count(self, key: str) -> int:
        """The number of elements of an array; 0 if there is no such array."""
        value = self._metadata.get(key)
        return value.count if isinstance(value, _Array) else 0

    def some_texts(self, key: str, places: Collection[int]) -> dict[int, str]:
        """The texts at these places of an array, those of the places that it has.

        Raises ConfigError if the value of `key` is not an array of texts.
        """
        value = self._metadata.get(key)
        if not isinstance(value, _Array) or value.text is None:
            raise ConfigError(f"{self.name} has no texts in {key}")
        return {i: value.text(i).decode(errors="replace") for i in places if 0 <= i < value.count}

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor in the mapped file, uint8 [all rows, bytes per row]."""
        tensor = self.tensors[name]
        contents = self._maps[tensor.path]
        flat = np.frombuffer(contents, np.uint8, tensor.num_bytes, tensor.start)
        return flat.reshape(prod(tensor.shape[:-1]), -1)

    def forget(self, name: str) -> None:
        """Let the kernel take back the memory of a tensor's bytes, which can be read again."""
        tensor = self.tensors[name]
        start = _round_up(tensor.start, mmap.PAGESIZE)
        if (length := tensor.start + tensor.num_bytes - start) > 0:
            self._maps[tensor.path].madvise(mmap.MADV_DONTNEED, start, length)

    def _check_split(self, file: _GgufFile, number: int, count: int) -> None:
        stated = file.metadata.get("split.no", 0), file.metadata.get("split.count", 0) or 1
        if stated != (number, count):
            raise ConfigError(
                f"{file.path} is part {stated[0]} of {stated[1]} by its metadata; by its name it "
                f"is part {number} of {count}, counted from 0"
            )


def open_gguf(path: Path) -> GgufCheckpoint:
    """The checkpoint at a `path` for which `find_gguf` finds files. Raises ConfigError."""
    return GgufCheckpoint(find_gguf(path))


class _GgufFile:
    """The metadata and the tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            if self._size < _HEADER.size:
                self._fail(f"it has only {self._size} bytes")
            with path.open("rb") as file:
                self.contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        self._at = 0
        try:
            self._check_header()
            num_tensors, num_entries = self._take(_U64), self._take(_U64)
            self._check_count("tensors", num_tensors, _LEAST_TENSOR_BYTES)
            self._check_count("entries of metadata", num_entries, _LEAST_ENTRY_BYTES)
            self.metadata: dict[str, Any] = {}
            for _ in range(num_entries):
                key = self._take_string()
                if key in self.metadata:
                    self._fail(f"it has {_shown(key)} twice")
                self.metadata[key] = self._take_value(key)
            self.tensors = self._take_tensors(num_tensors)
        except (struct.error, OverflowError):  # the latter for a place beyond all addresses
            self._fail("it is cut off")
        except UnicodeDecodeError:
            self._fail("it has a text that is not UTF-8")

    def _fail(self, reason: str) -> NoReturn:
        raise ConfigError(f"{self.path} is not a usable GGUF file: {reason}") from None

    def _check_header(self) -> None:
        magic, version = _HEADER.unpack_from(self.contents)
        self._at = _HEADER.size
        if magic != MAGIC:
            self._fail(f"it begins with {magic!r} instead of {MAGIC!r}")
        if version and not version & 0xFFFF:
            self._fail("it is big-endian; convert it to little-endian")
        if version not in _VERSIONS:
            self._fail(f"it has version {version}; minisrv reads versions 2 and 3")

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count > (self._size - self._at) // least_bytes:
            self._fail(f"it states {count} {what}, more than its {self._size} bytes can hold")

    def _take(self, number: struct.Struct) -> Any:
        (value,) = number.unpack_from(self.contents, self._at)
        self._at += number.size
        return value

    def _take_string(self) -> str:
        start = self._skip_string()
        return self.contents[start : self._at].decode()

    def _skip_string(self) -> int:
        """Go behind a string; returns where its bytes begin."""
        length = self._take(_U64)
        if length > self._size - self._at:
            self._fail(f"it states a text of {length} bytes at byte {self._at}, beyond its end")
        start = self._at
        self._at += length
        return start

    def _take_kind(self, key: str) -> GGUFValueType:
        number = self._take(_U32)
        try:
            return GGUFValueType(number)
        except ValueError:
            self._fail(f"{_shown(key)} has the unknown type {number}")

    def _take_value(self, key: str) -> Any:
        kind = self._take_kind(key)
        if kind is GGUFValueType.STRING:
            return self._take_string()
        if kind is not GGUFValueType.ARRAY:
            number = self._take(struct.Struct(f"<{_NUMBERS[kind]}"))
            return _shortest(number) if kind is GGUFValueType.FLOAT32 else number
        kind, count = self._take_kind(key), self._take(_U64)
        if kind is GGUFValueType.ARRAY:
            self._fail(f"{_shown(key)} is an array of arrays")
        if kind is GGUFValueType.STRING:
            self._check_count(f"texts in {_shown(key)}", count, _U64.size)
            ends = self._skip_strings(count)

            def text(i: int) -> bytes:
                return self.contents[ends[i] + _U64.size : ends[i + 1]]

            return _Array(count, lambda: self._strings(ends), text)
        start = self._at
        size = struct.calcsize(f"<{_NUMBERS[kind]}")
        self._check_count(f"numbers in {_shown(key)}", count, size)
        self._at += count * size
        numbers = f"<{count}{_NUMBERS[kind]}"
        return _Array(count, lambda: list(struct.unpack_from(numbers, self.contents, start)))

    def _skip_strings(self, count: int) -> array[int]:
        """Go behind some strings; returns where each length begins, and the end."""
        contents, at, unpack = self.contents, self._at, _U64.unpack_from
        ends = array("Q", [at])
        for _ in range(count):
            at += _U64.size + unpack(contents, at)[0]
            ends.append(at)
        if at > self._size:
            raise struct.error
        self._at = at
        return ends

    def _strings(self, ends: array[int]) -> list[str]:
        start, size = ends[0], _U64.size
        block = self.contents[start : ends[-1]]
        try:
            return [
                block[begin - start + size : end - start].decode() for begin, end in pairwise(ends)
            ]
        except UnicodeDecodeError:
            self._fail("it has a text that is not UTF-8")

    def _take_tensors(self, count: int) -> dict[str, GgufTensor]:
        """The tensors; the places in the file are relative to the end of this list."""
        listed: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]] = []
        for _ in range(count):
            name = self._take_string()
            num_dims = self._take(_U32)
            if not 1 <= num_dims <= _MAX_DIMS:
                self._fail(f"{_shown(name)} has {num_dims} dimensions")
            dims = [self._take(_U64) for _ in range(num_dims)]
            kind = self._tensor_kind(name, self._take(_U32))
            listed.append((name, kind, tuple(reversed(dims)), self._take(_U64)))
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"general.alignment is {_shown(alignment)}, not a power of two")
        data_start = _round_up(self._at, alignment)
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, kind, shape, offset in listed:
            if name in tensors:
                self._fail(f"it has the tensor {_shown(name)} twice")
            if offset != expected:
                self._fail(f"{_shown(name)} begins at byte {offset} of the data, not at {expected}")
            num_bytes = self._num_bytes(name, kind, shape)
            if data_start + offset + num_bytes > self._size:
                end = data_start + offset + num_bytes
                self._fail(f"{_shown(name)} ends at byte {end}, but the file has {self._size}")
            tensors[name] = GgufTensor(kind, shape, self.path, data_start + offset, num_bytes)
            expected = _round_up(offset + num_bytes, alignment)
        return tensors

    def _tensor_kind(self, name: str, number: int) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(number)
        except ValueError:
            self._fail(f"{_shown(name)} has the unknown type {number}")

    def _num_bytes(self, name: str, kind: GGMLQuantizationType, shape: Sequence[int]) -> int:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or not prod(shape):
            self._fail(f"{_shown(name)} has shape {list(shape)}, impossible for {kind.name}")
        return prod(shape) // block * block_bytes


def _shortest(number: float) -> float:
    """A float32 as it was written: 1e-06 instead of 9.999999974752427e-07."""
    return float(str(np.float32(number)))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _shown(value: object) -> str:
    """A value from the file, short and printable."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 80 else text[:80] + "..."
