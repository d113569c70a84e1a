"""How rank 0 sends each ForwardBatch to another rank: length-prefixed msgpack frames on a pipe."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, BinaryIO

import msgpack
import numpy as np

from minisrv.engine.forward_batch import ForwardBatch, SamplingColumns

_LENGTH = struct.Struct("<I")


def encode_plan(batch: ForwardBatch) -> bytes:
    """A frame: the length of its body, then the body. Penalties and logprobs stay on rank 0."""
    body: bytes = msgpack.packb([_packed(batch), _packed(batch.sampling)])
    return _LENGTH.pack(len(body)) + body


def read_plans(pipe: BinaryIO) -> Iterator[ForwardBatch]:
    """The batches from the pipe, until it is closed."""
    while head := pipe.read(_LENGTH.size):
        batch, sampling = msgpack.unpackb(pipe.read(_LENGTH.unpack(head)[0]))
        yield ForwardBatch(**_unpacked(batch), sampling=SamplingColumns(**_unpacked(sampling)))


def _packed(value: ForwardBatch | SamplingColumns) -> dict[str, Any]:
    packed: dict[str, Any] = {}
    for field in fields(value):
        entry = getattr(value, field.name)
        if isinstance(entry, np.ndarray):
            packed[field.name] = [entry.dtype.str, entry.tobytes()]
        elif isinstance(entry, int):
            packed[field.name] = entry
    return packed


def _unpacked(packed: dict[str, Any]) -> dict[str, Any]:
    return {
        name: entry if isinstance(entry, int) else np.frombuffer(entry[1], np.dtype(entry[0]))
        for name, entry in packed.items()
    }
