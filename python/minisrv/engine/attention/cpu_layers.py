"""All layers of a step of decodes in one call of C++ (`kernels/layers.cpp`), for packed weights.

With small models the way through Python between the operators of a layer is a sixth of the time of
a decode step.
"""

# Shapes: T tokens in the step, C hidden size.

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import CDLL, POINTER, Array, Structure, byref, c_float, c_int, c_long, c_void_p, cast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisrv.engine.attention.cpu import CpuAttention, DecodeGroup
from minisrv.engine.kernels import compiler
from minisrv.engine.kernels.base import DenseLayer, Product, RopeRows
from minisrv.engine.kernels.packed import PanelProduct, load_packed_library
from minisrv.engine.layers.packed_linear import SideBySide

_SOURCE = Path(compiler.__file__).with_name("layers.cpp")
_MOST_MATRICES = 3  # Projection::kMost in layers.cpp


class _Functions(Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("add_rms_norm", "silu_and_mul", "norm_rotate_store", "decode_attention"),
            "multiply",
        )
    )


class _Projection(Structure):
    _fields_ = (
        ("matrices", c_void_p * _MOST_MATRICES),
        ("biases", c_void_p * _MOST_MATRICES),
        ("outputs", c_long * _MOST_MATRICES),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, _Projection) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Sizes(Structure):
    _fields_ = (
        *((name, c_long) for name in ("hidden", "heads", "kv_heads", "head_size", "features")),
        ("page_size", c_long),
        *((name, c_float) for name in ("norm_eps", "head_norm_eps", "scale")),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "cos", "sin", "slots", "page_table", "rows")),
        ("kv_lens", c_void_p),
        *((name, c_long) for name in ("tokens", "columns", "shared")),
    )


def join_layers(layers: Sequence[DenseLayer] | None, attention: object) -> CpuLayers | None:
    """These layers in one call, or None if it does not have their products or their attention."""
    if not layers or not isinstance(attention, CpuAttention):
        return None
    if attention.pool.dtype is not torch.float32:
        return None
    products = [p for layer in layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    if not all(_matrices(product) for product in products):
        return None
    packed, library = load_packed_library(), compiler.load_library(_SOURCE)
    if packed is None or library is None:
        return None
    return CpuLayers(library, packed, layers, attention)


class CpuLayers:
    """A RunLayers for steps that have nothing but decodes, all in one group."""

    def __init__(
        self, library: CDLL, packed: CDLL, layers: Sequence[DenseLayer], attention: CpuAttention
    ) -> None:
        self._attention, self._layers = attention, layers
        self._run: Callable[..., None] = library.run_layers
        self._run.argtypes = [
            *(POINTER(_Functions), POINTER(_Layer), c_long, POINTER(_Sizes), POINTER(_Step)),
            c_int,
        ]
        self._run.restype = None
        functions: list[Any] = [*attention.kernels.layer_functions, packed.multiply]
        self._functions = _Functions(*(cast(function, c_void_p) for function in functions))
        first = layers[0]
        num_heads, num_kv_heads, head_dim = first.heads
        self._sizes = _Sizes(
            *(first.input_norm.w_C.shape[0], num_heads, num_kv_heads, head_dim),
            *(first.intermediate_size, attention.pool.page_size, first.input_norm.eps),
            0.0 if first.qk_norm is None else first.qk_norm.eps,
            head_dim**-0.5,
        )
        self._pages: object = None
        self._described: Array[_Layer] = (_Layer * 0)()

    def __call__(self, x_TC: Tensor, rope_rows: RopeRows) -> bool:
        group = self._attention.only_group()
        if group is None:
            return False
        if self._pages is not self._attention.pool.pages:
            self._pages = self._attention.pool.pages
            self._described = self._describe_layers()
        step = self._describe_step(group, x_TC, rope_rows)
        threads = self._attention.kernels.num_threads
        self._run(
            byref(self._functions),
            self._described,
            len(self._described),
            byref(self._sizes),
            byref(step),
            threads,
        )
        return True

    def _describe_layers(self) -> Array[_Layer]:
        return (_Layer * len(self._layers))(
            *(
                _Layer(
                    layer.input_norm.w_C.data_ptr(),
                    layer.post_norm.w_C.data_ptr(),
                    None if layer.qk_norm is None else layer.qk_norm.q_D.data_ptr(),
                    None if layer.qk_norm is None else layer.qk_norm.k_D.data_ptr(),
                    keys.data_ptr(),
                    values.data_ptr(),
                    *(
                        _describe(product)
                        for product in (layer.qkv, layer.out, layer.gate_up, layer.down)
                    ),
                )
                for layer, (keys, values) in zip(
                    self._layers, self._attention.pool.pages, strict=True
                )
            )
        )

    def _describe_step(self, group: DecodeGroup, x_TC: Tensor, rope_rows: RopeRows) -> _Step:
        assert x_TC.is_contiguous()
        cos, sin = rope_rows
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        page_table = self._attention.page_table
        return _Step(
            *(x_TC.data_ptr(), cos.data_ptr(), sin.data_ptr(), self._attention.slots_T.data_ptr()),
            *(page_table.data_ptr(), group.rows.data_ptr(), group.kv_lens.data_ptr()),
            *(x_TC.shape[0], page_table.shape[1], group.shared_len),
        )


def _matrices(product: Product) -> list[PanelProduct]:
    """The packed matrices of a product with float32 results; empty if it has others."""
    parts: Sequence[Any] = product.products if isinstance(product, SideBySide) else [product]
    found = [part for part in parts if isinstance(part, PanelProduct) and part.float_out]
    return found if len(found) == len(parts) <= _MOST_MATRICES else []


def _describe(product: Product) -> _Projection:
    found = _matrices(product)
    pointers = [matrix.pointers for matrix in found]
    missing = [None] * (_MOST_MATRICES - len(found))
    return _Projection(
        (c_void_p * _MOST_MATRICES)(*(matrix for matrix, _ in pointers), *missing),
        (c_void_p * _MOST_MATRICES)(*(bias for _, bias in pointers), *missing),
        (c_long * _MOST_MATRICES)(*(matrix.outputs for matrix in found)),
    )
