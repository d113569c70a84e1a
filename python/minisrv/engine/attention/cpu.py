"""Attention on a CPU by compiled operators that read the pages in place.

A prefix that several decoding sequences share is attended to once for all of them, then each
sequence's own suffix, and the two are merged by their sums of exponentials (Juravsky et al.,
Hydragen, 2024). Prefill chunks are computed one after the other.
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

_LEAST_TOKENS_SAVED = 512  # below that, the second pass and the merge cost more than they save


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes that share a prefix, or none."""

    tokens: Tensor | None  # [B] indices into the step's decodes; None if all of them
    rows: Tensor
    kv_lens: Tensor
    shared_len: int  # length of the prefix that is the same for the whole group


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    tokens: slice  # of the step's tokens
    row: int
    start: int  # position of the first token


class CpuAttention:
    """An AttentionBackend on the kernels of cpu.cpp."""

    def __init__(self, pool: KVPool, kernels: CpuKernels) -> None:
        self.pool, self.kernels = pool, kernels
        self._groups: list[DecodeGroup] = []
        self._chunks: list[_PrefillChunk] = []
        self._num_decodes = 0
        self.page_table = torch.empty(0)  # of the step
        self.slots_T = torch.empty(0)

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        self.page_table = torch.from_numpy(page_table.pages)
        self.slots_T = torch.from_numpy(page_table.slots(batch, token_positions(batch)))
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

    def only_group(self) -> DecodeGroup | None:
        """The decodes of the step, if they are one group and there is nothing else in the step."""
        if self._chunks or len(self._groups) != 1:
            return None
        return self._groups[0]

    def cache_slots(self, layer_id: int) -> CacheSlots:
        return CacheSlots(self.slots_T, *self.pool.slots[layer_id])

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        pages = self.pool.pages[layer_id]
        for group in self._groups:
            self._decode(q_THD, pages, group, out_THD)
        for chunk in self._chunks:
            self.kernels.prefill_attention(
                q_THD[chunk.tokens],
                pages,
                self.page_table[chunk.row],
                chunk.start,
                out_THD[chunk.tokens],
            )
        return out_THD

    def _decode(
        self, q_THD: Tensor, pages: tuple[Tensor, Tensor], group: DecodeGroup, out_THD: Tensor
    ) -> None:
        plan = (self.page_table, group.rows, group.kv_lens, group.shared_len)
        if group.tokens is None:
            n = self._num_decodes
            self.kernels.decode_attention(q_THD[:n], pages, *plan, out_THD[:n])
            return
        q_BHD = q_THD[group.tokens]
        out_BHD = torch.empty_like(q_BHD)
        self.kernels.decode_attention(q_BHD, pages, *plan, out_BHD)
        out_THD[group.tokens] = out_BHD


def _decode_groups(
    rows: Int32Array, kv_lens: Int32Array, page_table: PageTable
) -> list[DecodeGroup]:
    return [
        DecodeGroup(
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
    """Groups of decodes (indices), each with the length of their shared prefix.

    0 if sharing does not pay off. The last token of a sequence is never shared, so no suffix is
    empty.
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
