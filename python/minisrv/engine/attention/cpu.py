"""Attention on CPU by compiled operators that read the pages where they are.

What several decoding sequences share at their beginning is attended to once for all of them, then
each one's own rest, and both are merged by the sums of exponentials (Juravsky et al., Hydragen,
2024). Prefill chunks are computed one after the other.
"""

# Shapes: T tokens in the step, B decodes, H query heads, K key-value heads, D head size.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.kernels.cpu import CpuKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable, token_positions
from minisrv.wire.arrays import Int32Array, Int64Array

_LEAST_TOKENS_SAVED = 512  # by sharing; below, the second pass and the merge cost more


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    tokens: Tensor | None  # [B] indices into the step's decodes; None is all of them
    rows: Tensor
    kv_lens: Tensor
    shared_len: int  # positions at the beginning that are the same for all of the group


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    tokens: slice  # of the step
    row: int
    start: int  # position of the first token


class CpuAttention:
    """See AttentionBackend."""

    def __init__(self, pool: KVPool, kernels: CpuKernels) -> None:
        self._pool, self._kernels = pool, kernels
        self._groups: list[_DecodeGroup] = []
        self._chunks: list[_PrefillChunk] = []
        self._num_decodes = 0
        self._page_table = torch.empty(0)
        self._slots_T = torch.empty(0)

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        """See AttentionBackend."""
        self._page_table = torch.from_numpy(page_table.pages)
        self._slots_T = torch.from_numpy(page_table.slots(batch, token_positions(batch)))
        n = self._num_decodes = batch.num_decodes
        self._groups = _decode_groups(batch.rows[:n], batch.start_positions[:n] + 1, page_table)
        ends = np.cumsum(batch.query_lens)[n:].tolist()
        self._chunks = [
            _PrefillChunk(slice(end - length, end), row, start)
            for end, length, row, start in zip(
                ends,
                batch.query_lens[n:].tolist(),
                batch.rows[n:].tolist(),
                batch.start_positions[n:].tolist(),
                strict=True,
            )
        ]

    def cache_slots(self, layer_id: int) -> CacheSlots:
        """See AttentionBackend."""
        return CacheSlots(self._slots_T, *self._pool.slots[layer_id])

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        """See AttentionBackend."""
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        pages = self._pool.pages[layer_id]
        for group in self._groups:
            self._decode(q_THD, pages, group, out_THD)
        for chunk in self._chunks:
            self._kernels.prefill_attention(
                q_THD[chunk.tokens],
                pages,
                self._page_table[chunk.row],
                chunk.start,
                out_THD[chunk.tokens],
            )
        return out_THD

    def _decode(
        self, q_THD: Tensor, pages: tuple[Tensor, Tensor], group: _DecodeGroup, out_THD: Tensor
    ) -> None:
        plan = (self._page_table, group.rows, group.kv_lens, group.shared_len)
        if group.tokens is None:
            n = self._num_decodes
            self._kernels.decode_attention(q_THD[:n], pages, *plan, out_THD[:n])
            return
        q_BHD = q_THD[group.tokens]
        out_BHD = torch.empty_like(q_BHD)
        self._kernels.decode_attention(q_BHD, pages, *plan, out_BHD)
        out_THD[group.tokens] = out_BHD


def _decode_groups(
    rows: Int32Array, kv_lens: Int32Array, page_table: PageTable
) -> list[_DecodeGroup]:
    return [
        _DecodeGroup(
            tokens=None if len(members) == rows.size else torch.from_numpy(members),
            rows=torch.from_numpy(rows[members]),
            kv_lens=torch.from_numpy(kv_lens[members]),
            shared_len=shared_len,
        )
        for members, shared_len in _clusters(rows, kv_lens, page_table)
    ]


def _clusters(
    rows: Int32Array, kv_lens: Int32Array, page_table: PageTable
) -> list[tuple[Int64Array, int]]:
    """Groups of decodes, each with the positions that its members share, 0 where it does not pay.

    The last token of each sequence is never shared, so its own part is never empty.
    """
    pages, page_size = page_table.pages, page_table.page_size
    single = np.ones(rows.size, bool)
    clusters = []
    first_pages = pages[rows, 0]
    found, counts = np.unique(first_pages, return_counts=True)
    for first in found[counts > 1]:
        members = np.flatnonzero(first_pages == first)
        most = (int(kv_lens[members].min()) - 1) // page_size
        begins = pages[rows[members], :most]
        same = (begins == begins[0]).all(0)
        num_shared = most if same.all() else int(same.argmin())
        if num_shared * page_size * (len(members) - 1) >= _LEAST_TOKENS_SAVED:
            clusters.append((members, num_shared * page_size))
            single[members] = False
    if single.any():
        clusters.append((np.flatnonzero(single), 0))
    return clusters
