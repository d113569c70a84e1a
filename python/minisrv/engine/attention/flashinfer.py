"""Attention on a GPU by FlashInfer's FA2 kernels (Ye et al., FlashInfer, 2025).

Decodes and prefill chunks are two calls a layer, each planned once a step: in one call the tile
would be chosen for the average query, and decodes would ride tiles made for chunks. Both use the
same kernel module, the prefill one with the query heads of a key head packed into rows: it has no
forbidden group sizes, and only one module is compiled.
"""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size, B sequences.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.attention.page_lists import page_lists
from minisrv.engine.forward_batch import ForwardBatch, Int32Array
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable, token_positions

_WORKSPACE_BYTES = 128 * 2**20
_PLANS_IN_FLIGHT = 3


class FlashInferAttention:
    """See AttentionBackend. Raises ImportError where flashinfer is not installed."""

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        import flashinfer

        self._pool, self._device = pool, pool.device
        self._heads = (num_heads, pool.num_kv_heads, pool.head_dim, pool.page_size)
        self._types = {"q_data_type": pool.dtype, "kv_data_type": pool.stored_dtype}
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa2"
        )
        self._rings = {
            id(wrapper): _PinnedRing(wrapper) for wrapper in (self._decode, self._prefill)
        }
        self._num_decodes = 0
        self._has_prefills = False
        self._slots_T = torch.empty(0)

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        """See AttentionBackend."""
        self._slots_T = self._to_device(page_table.slots(batch, token_positions(batch)))
        kv_lens = batch.start_positions + batch.query_lens
        n = self._num_decodes = batch.num_decodes
        self._has_prefills = batch.rows.size > n
        if n:
            self._plan_decodes(batch.rows[:n], kv_lens[:n], page_table)
        if self._has_prefills:
            self._plan_prefills(batch.rows[n:], batch.query_lens[n:], kv_lens[n:], page_table)

    def cache_slots(self, layer_id: int) -> CacheSlots:
        """See AttentionBackend."""
        return CacheSlots(self._slots_T, *self._pool.slots[layer_id])

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        """See AttentionBackend."""
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        pages, n = self._pool.pages[layer_id], self._num_decodes
        if n:
            self._decode.run(q_THD[:n], pages, out=out_THD[:n])
        if self._has_prefills:
            self._prefill.run(q_THD[n:], pages, out=out_THD[n:])
        return out_THD

    def _plan_decodes(self, rows: Int32Array, kv_lens: Int32Array, page_table: PageTable) -> None:
        lists = page_lists(rows, kv_lens, page_table)
        with self._rings[id(self._decode)]:
            self._decode.plan(
                torch.from_numpy(lists.starts),
                self._to_device(lists.pages),
                torch.from_numpy(lists.last_page_lens),
                *self._heads,
                **self._types,
            )

    def _plan_prefills(
        self,
        rows: Int32Array,
        query_lens: Int32Array,
        kv_lens: Int32Array,
        page_table: PageTable,
    ) -> None:
        lists = page_lists(rows, kv_lens, page_table)
        query_starts = np.zeros(rows.size + 1, np.int32)
        np.cumsum(query_lens, out=query_starts[1:])
        with self._rings[id(self._prefill)]:
            self._prefill.plan(
                torch.from_numpy(query_starts),
                torch.from_numpy(lists.starts),
                self._to_device(lists.pages),
                torch.from_numpy(lists.last_page_lens),
                *self._heads,
                causal=True,
                **self._types,
            )

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


class _PinnedRing:
    """Host buffers that a wrapper's plans are written to in turn.

    A plan is copied to the device when the stream gets there. FlashInfer has one buffer, which the
    next plan would overwrite before that; here each waits for the copy of the plan three before.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        first = wrapper._pin_memory_int_workspace_buffer
        self._buffers = [first]
        while len(self._buffers) < _PLANS_IN_FLIGHT:
            self._buffers.append(torch.empty_like(first, pin_memory=first.is_pinned()))
        self._copied: list[Any] = [None] * _PLANS_IN_FLIGHT
        self._next = 0

    def __enter__(self) -> None:
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        self._wrapper._pin_memory_int_workspace_buffer = self._buffers[self._next]

    def __exit__(self, *exception: object) -> None:
        if self._buffers[0].is_pinned():
            self._copied[self._next] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[self._next].record()
        self._next = (self._next + 1) % _PLANS_IN_FLIGHT
