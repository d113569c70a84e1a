"""FlashInfer's module for XQA without its kernel: what the C++ reads of its operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.gpu_dry_run.fake_attention import require, require_vectors
from tests.gpu_dry_run.fake_cuda import NUM_SMS, FakeGPU

_PAGE_SIZES = (16, 32, 64, 128)
_MOST_ROWS = 32


@dataclass(frozen=True)
class XqaTypes:
    """What a module is compiled for, in the order of gen_xqa_module."""

    query: torch.dtype
    cache: torch.dtype
    page_size: int
    head_dim: int
    group: int
    sliding_window: bool
    out: torch.dtype
    q_seq_len: int
    ragged: bool


class XqaModule:
    """The module of gen_xqa_module, for one query per sequence."""

    def __init__(self, gpu: FakeGPU, types: XqaTypes) -> None:
        self._gpu, self._types = gpu, types
        require(types.page_size in _PAGE_SIZES, f"XQA with pages of {types.page_size} tokens")
        require(types.group <= _MOST_ROWS, f"XQA with {types.group} heads per key head")
        require(types.query is types.out, "XQA with another output than queries")
        require(not types.sliding_window and types.q_seq_len == 1, "a variant of XQA")

    def xqa_wrapper(
        self,
        in_fp8: bool,
        num_sms: int,
        num_kv_heads: int,
        window: int,
        q_scale: float,
        q_scale_tensor: Tensor | None,
        out: Tensor,
        out_scale: float,
        q: Tensor,
        sinks: Tensor | None,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None,
        value_scales: Tensor | None,
        page_table: Tensor,
        most_tokens: int,
        kv_lens: Tensor,
        batch_size: int,
        kv_scale: float,
        kv_scale_tensor: Tensor | None,
        q_seq_len: int,
        query_starts: Tensor | None,
        mask: Tensor | None,
        semaphores: Tensor,
        scratch: Tensor,
        pdl: bool,
    ) -> None:
        with self._gpu.uncounted():
            types, shape = self._types, (batch_size, 1, num_kv_heads * self._types.group)
            self._require(q, "the queries", types.query, (*shape, types.head_dim))
            self._require(out, "the output", types.out, (*shape, types.head_dim))
            page = types.page_size, num_kv_heads, types.head_dim
            for cache in (keys, values):
                self._require(cache, "the cache", types.cache, (len(keys), *page))
            for tensor in (q, out, keys, values):
                require_vectors(tensor)
            require(most_tokens == page_table.shape[1] * types.page_size, "another number of pages")
            table = batch_size, page_table.shape[1]
            self._require(page_table, "the page table", torch.int32, table)
            self._require(kv_lens, "the lengths", torch.uint32, (batch_size, 1))
            self._require(semaphores, "the semaphores", torch.uint32)
            require(len(semaphores) >= batch_size * num_kv_heads, "too few semaphores")
            self._require(scratch, "the scratch memory", torch.uint8)
            require(scratch.numel() >= self._scratch_bytes(), "too little scratch memory")
            require((num_sms, window, q_seq_len) == (NUM_SMS, 0, 1), "options")
            require((q_scale, kv_scale, out_scale) == (1.0, 1.0, 1.0), "scales")
            none = q_scale_tensor, kv_scale_tensor, sinks, key_scales, value_scales
            require((*none, query_starts, mask) == (None,) * 7, "options")
            require(in_fp8 == (types.cache is torch.float8_e4m3fn), "the kernel of another cache")
        self._gpu.launch("flashinfer::xqa")

    def _scratch_bytes(self) -> int:
        """Of the most parts, one per SM: sums and maxima of 32 rows each, and an output in 16 bits;
        both aligned to an output.
        """
        output = self._types.group * self._types.head_dim * 2
        return NUM_SMS * (2 * 32 * 4 + output) + 2 * output

    def _require(
        self, tensor: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None
    ) -> None:
        """Strides are read only of the cache, and there they are those of its shape."""
        self._gpu.require_on_device(tensor, name)
        require(tensor.dtype is dtype, f"{name} has dtype {tensor.dtype}, not {dtype}")
        require(tensor.is_contiguous(), f"{name} of XQA with gaps")
        found = tuple(tensor.shape)
        require(shape is None or found == shape, f"{name} has the shape {found}, not {shape}")
