"""Products with packed matrices in C++ (`packed.cpp`), compiled when the first one is loaded."""

# Shapes: T tokens in the step, O outputs and I inputs of a matrix, N of its rows.

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, POINTER, Structure, addressof, byref, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minisrv.engine.kernels.compiler import load_library
from minisrv.engine.packed import PackedMatrix

INPUT_DTYPES = (torch.float32, torch.bfloat16)
_SOURCE = Path(__file__).with_name("packed.cpp")
_HALVES, _HALVES_AND_OFFSETS, _EIGHT_BITS, _SIX_BITS = range(4)  # Scales in packed.cpp
_MOST_GROUPS = 16  # of a super scale: kMaxGroups in packed.cpp


class _Matrix(Structure):
    """Matrix in packed.cpp."""

    _fields_ = (
        ("panels", c_void_p),
        *((name, c_long) for name in ("outputs", "inputs", "bits", "group")),
        *((name, c_long) for name in ("groups", "scales", "zero", "most")),
    )


class Parts(Structure):
    """Parts in packed.cpp and gguf.cpp: the tensors of a PackedMatrix, null where it has none."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("values", "scales", "super_scales", "offsets", "super_offsets")
    )


@cache
def load_packed_library(source: Path = _SOURCE) -> CDLL | None:
    """The functions of packed.cpp; or None if they cannot be compiled."""
    library = load_library(source)
    if library is None:
        return None
    matrix = POINTER(_Matrix)
    library.packed_bytes.argtypes, library.packed_bytes.restype = [matrix], c_long
    library.pack.argtypes = [matrix, POINTER(Parts), c_int]
    library.multiply.argtypes = [
        *(matrix, c_void_p, c_long, c_void_p, c_void_p),
        *(c_long, c_long, c_int),
    ]
    library.lookup.argtypes = [matrix, c_void_p, c_void_p, c_long, c_long, c_int]
    for function in (library.pack, library.multiply, library.lookup):
        function.restype = None
    return library


def can_pack(matrix: PackedMatrix) -> bool:
    """Whether packed.cpp has the format of this matrix."""
    return (
        matrix.groups_per_super <= _MOST_GROUPS
        and matrix.shape[1] % 32 == 0
        and not (matrix.group == 32 and matrix.offsets is None and matrix.super_scales is not None)
        and (matrix.bits == 8 or matrix.group == 32 or matrix.groups_per_super % 2 == 0)
    )


class PanelProduct:
    """x_TI -> a new x_TI @ matrix.T + bias_O in `out_dtype`, with x_TI rounded to 8 bits.

    num_threads is asked before each product.
    """

    def __init__(
        self,
        library: CDLL,
        matrix: PackedMatrix,
        bias_O: Tensor | None,
        out_dtype: torch.dtype,
        num_threads: Callable[[], int],
    ) -> None:
        assert can_pack(matrix)
        self._library, self._num_threads, self._out_dtype = library, num_threads, out_dtype
        self.outputs, self._inputs = matrix.shape
        self.float_out = out_dtype is torch.float32
        self._bias = None if bias_O is None else bias_O.float()
        described = _Matrix(
            *(None, *matrix.shape, matrix.bits, matrix.group, *_scales(matrix)),
            *(matrix.zero, _greatest_magnitude(matrix.values)),
        )
        self._panels = torch.empty(library.packed_bytes(byref(described)), dtype=torch.uint8)
        described.panels = self._panels.data_ptr()
        self._described, self._matrix = described, byref(described)
        parts = [
            *(matrix.values, matrix.scales, matrix.super_scales),
            *(matrix.offsets, matrix.super_offsets),
        ]
        held = [None if part is None else part.contiguous() for part in parts]
        pointers = Parts(*(None if part is None else part.data_ptr() for part in held))
        library.pack(self._matrix, byref(pointers), num_threads())

    @property
    def pointers(self) -> tuple[int, int | None]:
        """Of the matrix and the bias, as `multiply` takes them."""
        return addressof(self._described), None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x_TI: Tensor) -> Tensor:
        assert x_TI.is_contiguous()
        assert x_TI.dtype in INPUT_DTYPES
        num_rows, inputs = x_TI.shape
        assert inputs == self._inputs
        out_TO = torch.empty(num_rows, self.outputs, dtype=self._out_dtype)
        self._library.multiply(
            self._matrix,
            x_TI.data_ptr(),
            x_TI.dtype is torch.float32,
            None if self._bias is None else self._bias.data_ptr(),
            out_TO.data_ptr(),
            self.float_out,
            num_rows,
            self._num_threads(),
        )
        return out_TO

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        assert ids_N.is_contiguous()
        assert ids_N.dtype is torch.int64
        out_NI = torch.empty(ids_N.shape[0], self._inputs, dtype=dtype)
        is_float = dtype is torch.float32
        pointers = self._matrix, ids_N.data_ptr(), out_NI.data_ptr()
        self._library.lookup(*pointers, is_float, ids_N.shape[0], self._num_threads())
        return out_NI


def _scales(matrix: PackedMatrix) -> tuple[int, int]:
    """Groups of a block, and how it has their scales."""
    plain, alone = matrix.super_scales is None, matrix.offsets is None
    if plain:
        kind = _HALVES if alone else _HALVES_AND_OFFSETS
    else:
        kind = _EIGHT_BITS if alone else _SIX_BITS
    return matrix.groups_per_super, kind


def _greatest_magnitude(values: Tensor) -> int:
    low, high = torch.aminmax(values)
    return max(-int(low), int(high))
