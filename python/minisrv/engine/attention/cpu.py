"""Attention on CPU with compiled decodes, which read the pages where they are.

What several sequences share at their beginning is attended to once for all of them, then each one's
own rest, and both are merged by the sums of exponentials (Juravsky et al., Hydragen, 2024). Prefill
chunks are computed as in torch_native.
"""

# Shapes: B decodes of one token, H query heads, D head size.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.forward_batch import Int32Array, Int64Array
from minisrv.engine.kernels.cpu import CpuKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable

_LEAST_TOKENS_SAVED = 512  # by sharing; below, the second pass and the merge cost more


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    tokens: Tensor | None  # [B] indices into the step's decodes; None is all of them
    rows: Tensor
    kv_lens: Tensor
    shared_len: int  # positions at the beginning that are the same for all of the group


class CpuAttention(TorchNativeAttention):
    """See AttentionBackend."""

    def __init__(
        self, pool: KVPool, dtype: torch.dtype, device: torch.device, kernels: CpuKernels
    ) -> None:
        super().__init__(pool, dtype, device)
        self._kernels = kernels
        self._groups: list[_DecodeGroup] = []
        self._page_table = torch.empty(0)

    def _plan_decodes(self, rows: Int32Array, kv_lens: Int32Array, page_table: PageTable) -> None:
        self._page_table = torch.from_numpy(page_table.pages)
        clusters = _clusters(rows, kv_lens, page_table)
        self._groups = [
            _DecodeGroup(
                tokens=None if len(members) == rows.size else torch.from_numpy(members),
                rows=torch.from_numpy(rows[members]),
                kv_lens=torch.from_numpy(kv_lens[members]),
                shared_len=shared_len,
            )
            for members, shared_len in clusters
        ]

    def _decode(self, q_BHD: Tensor, layer_id: int) -> Tensor:
        if len(self._groups) == 1:
            return self._attend(q_BHD, self._groups[0], layer_id)
        out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
        for group in self._groups:
            out_BHD[group.tokens] = self._attend(q_BHD[group.tokens], group, layer_id)
        return out_BHD

    def _attend(self, q_BHD: Tensor, group: _DecodeGroup, layer_id: int) -> Tensor:
        return self._kernels.decode_attention(
            q_BHD,
            self._pool.pages[layer_id],
            self._page_table,
            group.rows,
            group.kv_lens,
            group.shared_len,
        )


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
