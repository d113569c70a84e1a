"""The quantized types of GGUF files as packed matrices.

The layouts are those that `gguf.quants` documents in code: blocks of 32 inputs, or for K types of
256, each with its scales. `PackedMatrix.dequantized` equals its `dequantize` bit for bit.
"""

# Shapes: O outputs, B blocks of inputs; "bytes" are those of a block.

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from minisrv.engine.kernels import compiler
from minisrv.engine.kernels.packed import Parts
from minisrv.engine.packed import PackedMatrix, convert, empty_like

_BLOCK_BYTES = 1 << 18  # of the file, converted together
_Kind = GGMLQuantizationType


def from_gguf(
    kind: GGMLQuantizationType, raw: Tensor | NDArray[np.uint8], shape: tuple[int, int]
) -> PackedMatrix:
    """raw: uint8 [outputs, bytes per row] or flat, may be a read-only map of the file.

    Raises KeyError for a type that is not in `KINDS`.
    """
    unpack, size = _UNPACK[kind], GGML_QUANT_SIZES[kind][1]
    if not isinstance(raw, Tensor):
        with warnings.catch_warnings():  # that it is read-only; nothing writes to it
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.from_numpy(raw)
    blocks = raw.view(shape[0], -1, size)
    if (library := _load_library()) is not None and kind in _COMPILED:
        matrix = _converted(library, kind, blocks)
    else:
        step = max(1, _BLOCK_BYTES // (blocks.shape[1] * size))
        matrix = convert(torch.split(blocks, step), unpack)
    assert matrix.shape == shape
    return matrix


@cache
def _load_library() -> ctypes.CDLL | None:
    library = compiler.load_library(Path(compiler.__file__).with_name("gguf.cpp"))
    for kind in _COMPILED if library is not None else ():
        function = getattr(library, f"unpack_{kind.name}")
        numbers = ctypes.c_long, ctypes.c_long
        function.argtypes = [ctypes.c_void_p, *numbers, ctypes.POINTER(Parts), ctypes.c_int]
        function.restype = None
    return library


def _converted(library: ctypes.CDLL, kind: GGMLQuantizationType, blocks: Tensor) -> PackedMatrix:
    """In C++. The first row is also converted with torch, which shows the sizes."""
    assert blocks.is_contiguous()
    rows, per_row, _ = blocks.shape
    matrix = empty_like(_UNPACK[kind](blocks[:1]), rows)
    parts = {name: tensor.data_ptr() for name, tensor in matrix.tensors().items()}
    unpack = getattr(library, f"unpack_{kind.name}")
    unpack(blocks.data_ptr(), rows, per_row, ctypes.byref(Parts(**parts)), torch.get_num_threads())
    return matrix


def _half(blocks: Tensor, start: int) -> Tensor:
    """float16 [O, B]"""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _divided(packed: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return packed.view(*packed.shape[:-1], *sizes)


def _shifted(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[..., n] -> [..., len(shifts), n]: the bits of each byte that remain after each shift."""
    by = torch.tensor(shifts, dtype=torch.uint8).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> by) & mask


def _nibbles(values: Tensor) -> Tensor:
    """uint8 [O, B, n, 32], below 16 -> [O, B * n * 16], as PackedMatrix has them."""
    low, high = torch.split(values, 16, -1)
    packed: Tensor = (low | high << 4).flatten(1)
    return packed


def _q4_0(blocks: Tensor) -> PackedMatrix:
    return PackedMatrix(4, 32, blocks[..., 2:].flatten(1), _half(blocks, 0), zero=8)


def _q4_1(blocks: Tensor) -> PackedMatrix:
    scales, offsets = _half(blocks, 0), _half(blocks, 2)
    return PackedMatrix(4, 32, blocks[..., 4:].flatten(1), scales, offsets=offsets)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """low: [O, B, 16], high: [O, B, 4], of which bit i belongs to input i -> int8 [O, B, 32]"""
    fifth = ((high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)
    return (_shifted(low, (0, 4), 15).flatten(-2) | fifth << 4).view(torch.int8)


def _q5_0(blocks: Tensor) -> PackedMatrix:
    values = _five_bits(blocks[..., 6:], blocks[..., 2:6]).sub_(16)
    return PackedMatrix(8, 32, values.flatten(1), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> PackedMatrix:
    values = _five_bits(blocks[..., 8:], blocks[..., 4:8])
    return PackedMatrix(8, 32, values.flatten(1), _half(blocks, 0), offsets=_half(blocks, 2))


def _q8_0(blocks: Tensor) -> PackedMatrix:
    values = blocks[..., 2:].flatten(1).view(torch.int8)
    return PackedMatrix(8, 32, values, _half(blocks, 0))


def _two_bits(packed: Tensor) -> Tensor:
    """[O, B, 64] -> [O, B, 8, 32]"""
    return _shifted(_divided(packed, 2, 32), (0, 2, 4, 6), 3).flatten(2, 3)


def _q2_k(blocks: Tensor) -> PackedMatrix:
    scales, values = blocks[..., :16], _nibbles(_two_bits(blocks[..., 16:80]))
    return PackedMatrix(
        4,
        16,
        values,
        (scales & 15).flatten(1).view(torch.int8),
        _half(blocks, 80),
        (scales >> 4).flatten(1).view(torch.int8),
        -_half(blocks, 82),
    )


def _q3_k(blocks: Tensor) -> PackedMatrix:
    third = _shifted(blocks[..., :32], tuple(range(8)), 1)
    values = _nibbles(_two_bits(blocks[..., 32:96]) + third * 4 + 4)  # from -4 .. 3, with 8 added
    low = _shifted(blocks[..., 96:104], (0, 4), 15).flatten(-2)
    high = _shifted(blocks[..., 104:108], (0, 2, 4, 6), 3).flatten(-2)
    scales = (low | high << 4).flatten(1).view(torch.int8) - 32
    return PackedMatrix(4, 16, values, scales, _half(blocks, 108), zero=8)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: [O, B, 12] -> scales and offsets, int8 [O, B * 8]"""
    first, second, rest = torch.split(packed, 4, -1)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), -1)
    offsets = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), -1)
    return scales.flatten(1).view(torch.int8), offsets.flatten(1).view(torch.int8)


def _q4_k(blocks: Tensor) -> PackedMatrix:
    scales, offsets = _six_bit_scales(blocks[..., 4:16])
    # Of 64 inputs, the file has the first 32 in the low halves of 32 bytes.
    low, high = _divided(blocks[..., 16:], 4, 2, 16).unbind(-2)
    values = torch.stack(((low & 15) | (high << 4), (low >> 4) | (high & 240)), -2)
    return PackedMatrix(
        4, 32, values.flatten(1), scales, _half(blocks, 0), offsets, -_half(blocks, 2)
    )


def _q5_k(blocks: Tensor) -> PackedMatrix:
    scales, offsets = _six_bit_scales(blocks[..., 4:16])
    low = _shifted(_divided(blocks[..., 48:], 4, 32), (0, 4), 15).flatten(2, 3)
    fifth = _shifted(blocks[..., 16:48], tuple(range(8)), 1)
    values = (low | fifth << 4).flatten(1).view(torch.int8)
    return PackedMatrix(8, 32, values, scales, _half(blocks, 0), offsets, -_half(blocks, 2))


def _q6_k(blocks: Tensor) -> PackedMatrix:
    low = _shifted(_divided(blocks[..., :128], 2, 64), (0, 4), 15)
    high = _shifted(_divided(blocks[..., 128:192], 2, 32), (0, 2, 4, 6), 3)
    values = (low.flatten(-2) | high.flatten(-2) << 4).flatten(1).view(torch.int8).sub_(32)
    scales = blocks[..., 192:208].flatten(1).view(torch.int8)
    return PackedMatrix(8, 16, values, scales, _half(blocks, 208))


_UNPACK: dict[GGMLQuantizationType, Callable[[Tensor], PackedMatrix]] = {
    _Kind.Q4_0: _q4_0,
    _Kind.Q4_1: _q4_1,
    _Kind.Q5_0: _q5_0,
    _Kind.Q5_1: _q5_1,
    _Kind.Q8_0: _q8_0,
    _Kind.Q2_K: _q2_k,
    _Kind.Q3_K: _q3_k,
    _Kind.Q4_K: _q4_k,
    _Kind.Q5_K: _q5_k,
    _Kind.Q6_K: _q6_k,
}
KINDS = frozenset(_UNPACK)
_COMPILED = frozenset({_Kind.Q4_0, _Kind.Q4_1, _Kind.Q8_0, _Kind.Q4_K, _Kind.Q5_K, _Kind.Q6_K})
