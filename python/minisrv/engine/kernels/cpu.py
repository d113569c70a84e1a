"""The operators in C++ (`cpu.cpp`), compiled at the first start on a machine.

A small model's decode step is dominated by the overhead of calling operators. One call of these
replaces up to seven torch calls.
"""

# Shapes: as in base.py; B decodes of one token, N pages of P tokens.

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisrv.engine.kernels.base import (
    CacheSlots,
    MakePackedProduct,
    MakeProduct,
    PackedProduct,
    PenaltyColumns,
    Product,
    QKNormWeights,
    RopeRows,
    RunExperts,
    SampleRows,
    SmallBatchKernels,
)
from minisrv.engine.kernels.compiler import load_library
from minisrv.engine.kernels.packed import PanelProduct, can_pack, load_packed_library
from minisrv.engine.kernels.torch_native import route
from minisrv.engine.packed import PackedMatrix

# Of the operators, and of the KV cache.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)
ATTENTION_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
_SOURCE = Path(__file__).with_name("cpu.cpp")
_PANEL = 16  # outputs that are stored together; kPanel in product.h
# The number of threads comes last in all functions. Of those that exist once per dtype:
_ARGUMENTS: dict[str, list[Any]] = {
    "add_rms_norm": [c_void_p] * 4 + [c_long] * 2 + [c_float],
    "silu_and_mul": [c_void_p] * 2 + [c_long] * 2,
}
# Of those that exist once per pair of `DTYPES`:
_CACHE_ARGUMENTS: dict[str, list[Any]] = {
    "norm_rotate_store": [c_void_p] * 8 + [c_long] * 4 + [c_float],
    "prefill_attention": (
        [c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long, c_long, c_void_p]
        + [c_long] * 4
        + [c_float]
    ),
    "decode_attention": (
        [c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long]
        + [c_void_p]
        + [c_long] * 5
        + [c_float]
    ),
}
_PRODUCT_ARGUMENTS: dict[str, list[Any]] = {
    "pack_weights": [c_void_p] * 2 + [c_long] * 2,
    "multiply_packed": [c_void_p] * 4 + [c_long] * 4,
}
_LOGIT_ARGUMENTS: dict[str, list[Any]] = {
    "mask_logits": [c_void_p] * 3 + [c_long] * 3,
    "argmax": [c_void_p] * 2 + [c_long] * 2,
    "penalize": [c_void_p] * 5 + [c_long] * 2,
}


def load_cpu_kernels(
    dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> CpuKernels | None:
    """The compiled operators for `dtype`, or None if there are none (compiler.py logs why).

    cache_dtype: of the KV cache; by default the same.
    """
    cache_dtype = cache_dtype or dtype
    if (dtype, cache_dtype) not in DTYPES:
        return None
    library = load_cpu_library()
    if library is None:
        return None
    return CpuKernels(library, dtype, cache_dtype, torch.get_num_threads())


def load_cpu_library() -> CDLL | None:
    """The functions of cpu.cpp; or None if they cannot be compiled."""
    return load_library(_SOURCE)


class CpuKernels:
    """Kernels, and attention over the pages of the cache."""

    sample: SampleRows | None = None
    run_experts: RunExperts | None = None
    small_batch: SmallBatchKernels | None = None

    def __init__(
        self, library: CDLL, dtype: torch.dtype, cache_dtype: torch.dtype, num_threads: int
    ) -> None:
        self.num_threads = num_threads
        self.make_product: MakeProduct | None = self._make_product
        self.make_packed_product: MakePackedProduct | None = self._make_packed_product
        name, cache_name = (str(d).removeprefix("torch.") for d in (dtype, cache_dtype))
        functions = [_function(library, f"{n}_{name}", a) for n, a in _ARGUMENTS.items()]
        self._add_rms_norm, self._silu_and_mul = functions
        self._norm_rotate_store, self._prefill_attention, self._decode_attention = (
            _function(library, f"{n}_{name}_in_{cache_name}", a)
            for n, a in _CACHE_ARGUMENTS.items()
        )
        self._pack, self._multiply = (_function(library, *f) for f in _PRODUCT_ARGUMENTS.items())
        of_logits = [_function(library, *f) for f in _LOGIT_ARGUMENTS.items()]
        self._mask_logits, self._argmax, self._penalize = of_logits

    @property
    def layer_functions(self) -> tuple[Callable[..., None], ...]:
        """Functions of layers.cpp, in the order of its struct."""
        return (
            *(self._add_rms_norm, self._silu_and_mul, self._norm_rotate_store),
            self._decode_attention,
        )

    def _make_product(
        self, weight_OI: Tensor, bias_O: Tensor | None, out_dtype: torch.dtype
    ) -> Product | None:
        """Packs bf16 weights with an even number of inputs."""
        if weight_OI.dtype is not torch.bfloat16 or weight_OI.shape[1] % 2:
            return None
        outputs, inputs = weight_OI.shape
        panels = torch.empty(-(-outputs // _PANEL), inputs // 2, _PANEL, 2, dtype=torch.bfloat16)
        weight_OI = weight_OI.contiguous()
        self._pack(weight_OI.data_ptr(), panels.data_ptr(), outputs, inputs, self.num_threads)
        is_float = int(out_dtype is torch.float32)

        def product(x_TI: Tensor) -> Tensor:
            assert x_TI.is_contiguous()
            bias = None if bias_O is None else bias_O.data_ptr()
            out_TO = torch.empty(x_TI.shape[0], outputs, dtype=out_dtype)
            pointers = (x_TI.data_ptr(), panels.data_ptr(), bias, out_TO.data_ptr())
            sizes = (x_TI.shape[0], outputs, inputs)
            self._multiply(*pointers, is_float, *sizes, self.num_threads)
            return out_TO

        return product

    def _make_packed_product(
        self, matrix: PackedMatrix, bias_O: Tensor | None, out_dtype: torch.dtype
    ) -> PackedProduct | None:
        library = load_packed_library()
        if library is None or not can_pack(matrix):
            return None
        return PanelProduct(library, matrix, bias_O, out_dtype, lambda: self.num_threads)

    def add_rms_norm_(self, x_TC: Tensor, delta: Tensor | None, w_C: Tensor, eps: float) -> Tensor:
        assert x_TC.is_contiguous()
        assert delta is None or (delta.dim() == 2 and delta.is_contiguous())
        out_TC = torch.empty_like(x_TC)
        added = None if delta is None else delta.data_ptr()
        pointers = (x_TC.data_ptr(), added, w_C.data_ptr(), out_TC.data_ptr())
        self._add_rms_norm(*pointers, *x_TC.shape, eps, self.num_threads)
        return out_TC

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        num_tokens, size = gate_up.shape
        out_TF = gate_up.new_empty(num_tokens, size // 2)
        pointers = (gate_up.data_ptr(), out_TF.data_ptr())
        self._silu_and_mul(*pointers, num_tokens, size // 2, self.num_threads)
        return out_TF

    def norm_rotate_store_(
        self,
        qkv_TAD: Tensor,
        num_heads: int,
        norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> None:
        assert qkv_TAD.is_contiguous()
        num_tokens, num_all_heads, head_dim = qkv_TAD.shape
        cos, sin = rope_rows
        self._norm_rotate_store(
            qkv_TAD.data_ptr(),
            None if norm is None else norm.q_D.data_ptr(),
            None if norm is None else norm.k_D.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cache.slots_T.data_ptr(),
            cache.keys_NKD.data_ptr(),
            cache.values_NKD.data_ptr(),
            num_tokens,
            num_heads,
            (num_all_heads - num_heads) // 2,
            head_dim,
            0.0 if norm is None else norm.eps,
            self.num_threads,
        )

    def mask_logits_(self, logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
        assert logits_SV.is_contiguous()
        assert logits_SV.dtype is torch.float32
        assert masks_GW.is_contiguous()
        num_masks, num_words = masks_GW.shape
        assert num_words * 32 >= logits_SV.shape[1]
        pointers = (logits_SV.data_ptr(), samples_G.data_ptr(), masks_GW.data_ptr())
        self._mask_logits(*pointers, num_masks, num_words, logits_SV.shape[1], self.num_threads)

    def penalize_(self, logits_SV: Tensor, counts_RV: Tensor, penalties: PenaltyColumns) -> None:
        assert logits_SV.is_contiguous()
        assert logits_SV.dtype is torch.float32
        pointers = (
            logits_SV.data_ptr(),
            counts_RV.data_ptr(),
            penalties.samples_E.data_ptr(),
            penalties.rows_E.data_ptr(),
            penalties.factors_3E.data_ptr(),
        )
        num_samples, vocab_size = penalties.samples_E.numel(), logits_SV.shape[1]
        self._penalize(*pointers, num_samples, vocab_size, self.num_threads)

    def route(self, logits_TE: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        return route(logits_TE, per_token, normalize)

    def argmax(self, logits_SV: Tensor) -> Tensor:
        assert logits_SV.is_contiguous()
        assert logits_SV.dtype is torch.float32
        out_S = torch.empty(logits_SV.shape[0], dtype=torch.int64)
        self._argmax(logits_SV.data_ptr(), out_S.data_ptr(), *logits_SV.shape, self.num_threads)
        return out_S

    def decode_attention(
        self,
        q_BHD: Tensor,
        pages: tuple[Tensor, Tensor],
        page_table: Tensor,
        rows_B: Tensor,
        kv_lens_B: Tensor,
        shared_len: int,
        out_BHD: Tensor,
    ) -> None:
        """Attention of one token per sequence over its cached positions, into `out_BHD`.

        pages: keys and values [N, P, K, D]. page_table: int32, the pages of each row; `rows_B`
        (int32) are the rows of the sequences. kv_lens_B: int32, at least 1. shared_len: length of
        a prefix on the same pages for all; a multiple of P, less than every kv_len.
        """
        keys, values = pages
        size, num_heads, head_dim = q_BHD.shape
        assert head_dim in ATTENTION_HEAD_DIMS
        assert q_BHD.stride()[1:] == (head_dim, 1)
        assert out_BHD.is_contiguous()
        self._decode_attention(
            q_BHD.data_ptr(),
            q_BHD.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            page_table.data_ptr(),
            page_table.shape[1],
            rows_B.data_ptr(),
            kv_lens_B.data_ptr(),
            shared_len,
            out_BHD.data_ptr(),
            size,
            num_heads,
            keys.shape[2],
            head_dim,
            keys.shape[1],
            head_dim**-0.5,
            self.num_threads,
        )

    def prefill_attention(
        self,
        q_THD: Tensor,
        pages: tuple[Tensor, Tensor],
        page_row: Tensor,
        start: int,
        out_THD: Tensor,
    ) -> None:
        """Causal attention of a chunk, positions `start` and up of a sequence, into `out_THD`.

        The pages must already contain the chunk's keys and values. page_row: int32, the sequence's
        pages.
        """
        keys, values = pages
        num_tokens, num_heads, head_dim = q_THD.shape
        assert head_dim in ATTENTION_HEAD_DIMS
        assert q_THD.stride()[1:] == (head_dim, 1)
        assert out_THD.is_contiguous()
        self._prefill_attention(
            q_THD.data_ptr(),
            q_THD.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            page_row.data_ptr(),
            start,
            num_tokens,
            out_THD.data_ptr(),
            num_heads,
            keys.shape[2],
            head_dim,
            keys.shape[1],
            head_dim**-0.5,
            self.num_threads,
        )


def _function(library: CDLL, name: str, arguments: list[Any]) -> Callable[..., None]:
    function = library[name]
    function.argtypes, function.restype = [*arguments, c_int], None
    return function
