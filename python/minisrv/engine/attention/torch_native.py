"""Attention in plain torch, on any device, and the reference for the other backends.

Decodes are computed together: the pages of each sequence are gathered, padded to the longest and
masked. The query heads that share a key head are rows of one product, which on a CPU is several
times faster than repeating keys and values. Sequences of very different lengths go into separate
groups, so that padding at most doubles the work. Prefill chunks are computed one after the other.
"""

# Shapes: T tokens in the step, B sequences, H query heads, K key-value heads, G = H / K, D head
# size, C cached tokens, padded to whole pages.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable, token_positions
from minisrv.wire.arrays import Int32Array, Int64Array

_GROUP_SLACK_PAGES = 8


@dataclass(frozen=True, slots=True)
class _Gather:
    """Pages to read, and the buffers to copy them to, which all layers of a step reuse.

    Allocating buffers for each layer would cost more in page faults than the copy itself.
    """

    pages: Tensor  # [B * pages per sequence]
    num_sequences: int
    keys: Tensor  # [B * pages per sequence, page size, K, D]
    values: Tensor


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    tokens: Tensor | None  # [B] indices into the step's tokens; None if all of them
    cached: _Gather
    mask: Tensor | None  # [B, 1, 1, C] added to the attention scores


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    first: int
    end: int  # the step's tokens first .. end - 1
    cached: _Gather | None  # None if the chunk starts its sequence
    kv_len: int
    mask: Tensor | None  # [end - first, kv_len] added to the attention scores


class TorchNativeAttention:
    """An AttentionBackend for any device."""

    def __init__(self, pool: KVPool) -> None:
        self._pool, self._dtype, self._device = pool, pool.dtype, pool.device
        self._decodes: list[_DecodeGroup] = []
        self._prefills: list[_PrefillChunk] = []
        self._num_decodes = 0
        self._slots_T = torch.empty(0)

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        self._slots_T = self._to_device(page_table.slots(batch, token_positions(batch)))
        kv_lens = batch.start_positions + batch.query_lens
        n = self._num_decodes = batch.num_decodes
        self._plan_decodes(batch.rows[:n], kv_lens[:n], page_table)
        ends = np.cumsum(batch.query_lens).tolist()
        self._prefills = [
            self._prefill_chunk(i, ends[i], batch, int(kv_lens[i]), page_table)
            for i in range(n, batch.rows.size)
        ]

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        n = self._num_decodes
        if not self._prefills:
            return self._decode(q_THD, layer_id)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        if n:
            out_THD[:n] = self._decode(q_THD[:n], layer_id)
        for chunk in self._prefills:
            part = slice(chunk.first, chunk.end)
            out_THD[part] = self._prefill(q_THD[part], k_TKD[part], v_TKD[part], chunk, layer_id)
        return out_THD

    def cache_slots(self, layer_id: int) -> CacheSlots:
        return CacheSlots(self._slots_T, *self._pool.slots[layer_id])

    def _plan_decodes(self, rows: Int32Array, kv_lens: Int32Array, page_table: PageTable) -> None:
        groups = _groups_of_like_length(kv_lens, page_table.page_size)
        self._decodes = [
            self._decode_group(None if len(groups) == 1 else group, rows, kv_lens, page_table)
            for group in groups
        ]

    def _decode(self, q_BHD: Tensor, layer_id: int) -> Tensor:
        if len(self._decodes) == 1:
            return self._decode_one_group(q_BHD, self._decodes[0], layer_id)
        out_BHD = torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
        for group in self._decodes:
            out_BHD[group.tokens] = self._decode_one_group(q_BHD[group.tokens], group, layer_id)
        return out_BHD

    def _decode_one_group(self, q_BHD: Tensor, group: _DecodeGroup, layer_id: int) -> Tensor:
        keys, values = self._read(group.cached, layer_id)
        size, num_heads, head_dim = q_BHD.shape
        q_BKGD = q_BHD.view(size, keys.shape[1], -1, head_dim)
        out_BKGD = F.scaled_dot_product_attention(q_BKGD, keys, values, attn_mask=group.mask)
        return out_BKGD.reshape(size, num_heads, head_dim)

    def _prefill(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, chunk: _PrefillChunk, layer_id: int
    ) -> Tensor:
        if chunk.cached is None:
            keys, values = k_TKD.transpose(0, 1)[None], v_TKD.transpose(0, 1)[None]
        else:
            keys, values = self._read(chunk.cached, layer_id)
            keys, values = keys[:, :, : chunk.kv_len], values[:, :, : chunk.kv_len]
        out_1HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=True,
        )
        return out_1HTD[0].transpose(0, 1)

    def _read(self, gather: _Gather, layer_id: int) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pages, each [B, K, C, D], valid until the next read."""
        keys, values = self._pool.pages[layer_id]
        torch.index_select(keys, 0, gather.pages, out=gather.keys)
        torch.index_select(values, 0, gather.pages, out=gather.values)
        shape = (gather.num_sequences, -1, *keys.shape[2:])
        keys, values = gather.keys.to(self._dtype), gather.values.to(self._dtype)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)

    def _gather(self, pages: Int64Array) -> _Gather:
        keys, values = self._pool.pages[0]
        shape = (pages.size, *keys.shape[1:])
        return _Gather(
            self._to_device(pages.reshape(-1)),
            len(pages),
            keys.new_empty(shape),
            values.new_empty(shape),
        )

    def _decode_group(
        self,
        group: Int32Array | None,
        rows: Int32Array,
        kv_lens: Int32Array,
        page_table: PageTable,
    ) -> _DecodeGroup:
        chosen = slice(None) if group is None else group
        lens = kv_lens[chosen]
        pages = page_table.padded_pages(rows[chosen], lens)
        mask = self._mask(lens, pages.shape[1] * page_table.page_size)
        return _DecodeGroup(
            tokens=None if group is None else self._to_device(group),
            cached=self._gather(pages),
            mask=mask[:, None, None],
        )

    def _prefill_chunk(
        self, index: int, end: int, batch: ForwardBatch, kv_len: int, page_table: PageTable
    ) -> _PrefillChunk:
        length = int(batch.query_lens[index])
        # With an FP8 cache even the chunk's own keys and values are read back from it, so that a
        # prompt gives the same text whether or not its prefix was cached.
        if length == kv_len and self._pool.stored_dtype is self._dtype:
            return _PrefillChunk(end - length, end, None, kv_len, None)
        pages = page_table.padded_pages(batch.rows[index : index + 1], np.array([kv_len], np.int32))
        visible = np.arange(kv_len - length + 1, kv_len + 1, dtype=np.int32)
        return _PrefillChunk(
            end - length, end, self._gather(pages), kv_len, self._mask(visible, kv_len)
        )

    def _mask(self, visible: Int32Array, length: int) -> Tensor:
        """Row i: 0 at the first `visible[i]` positions, minus infinity after; [any, length]."""
        hidden = np.arange(length, dtype=np.int32) >= visible[:, None]
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(self._to_device(hidden), -torch.inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _groups_of_like_length(kv_lens: Int32Array, page_size: int) -> list[Int32Array]:
    """Indices into `kv_lens`, in groups whose longest is at most about twice the shortest."""
    if not kv_lens.size:
        return []
    slack = _GROUP_SLACK_PAGES * page_size
    if kv_lens.max() <= 2 * kv_lens.min() + slack:
        return [np.arange(kv_lens.size, dtype=np.int32)]
    order = np.argsort(kv_lens, kind="stable").astype(np.int32)
    lens, firsts = kv_lens[order], [0]
    for i, length in enumerate(lens.tolist()):
        if length > 2 * lens[firsts[-1]] + slack:
            firsts.append(i)
    return np.split(order, firsts[1:])
