"""Attention in plain torch: the backend on CPU, and the reference for the others.

Decodes are computed together: the pages of each sequence are gathered, padded to the longest and
masked. The query heads that share a key head are rows of one product, which on a CPU is several
times faster than to repeat keys and values. Sequences of very different lengths go in groups, so
that padding at most doubles the work. Where all sequences of a group begin with the same pages, a
CPU attends to those once for the whole group and merges with each sequence's own part by the sums
of exponentials (Juravsky et al., Hydragen, 2024). Prefill chunks are computed one after the other.
"""

# Shapes: T tokens in the step, B sequences, H query heads, K key-value heads, G = H / K, D head
# size, C cached tokens, padded to whole pages.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch, Int32Array, Int64Array
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable, token_positions

_GROUP_SLACK_PAGES = 8
_LEAST_TOKENS_SAVED = 512  # by attending to a shared prefix once; below, the merge costs more


@dataclass(frozen=True, slots=True)
class _Gather:
    """Pages to read, and where to: buffers that the layers of a step use in turn.

    To allocate them for each layer would cost more in page faults than the copy itself.
    """

    pages: Tensor  # [B * pages a sequence]
    num_sequences: int
    keys: Tensor  # [B * pages a sequence, page size, K, D]
    values: Tensor


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    tokens: Tensor | None  # [B] indices into the step's tokens; None is all of them
    shared: _Gather | None  # read by every sequence before its own pages
    own: _Gather
    mask: Tensor | None  # [B, 1, 1, C] added to the scores


@dataclass(frozen=True, slots=True)
class _PrefillChunk:
    first: int
    end: int  # tokens of the step: first to end
    cached: _Gather | None  # None where the chunk begins its sequence
    kv_len: int
    mask: Tensor | None  # [end - first, kv_len] added to the scores


class TorchNativeAttention:
    """See AttentionBackend."""

    def __init__(self, pool: KVPool, dtype: torch.dtype, device: torch.device) -> None:
        self._pool, self._dtype, self._device = pool, dtype, device
        self._decodes: list[_DecodeGroup] = []
        self._prefills: list[_PrefillChunk] = []
        self._slots_T = torch.empty(0)

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        """See AttentionBackend."""
        self._slots_T = self._to_device(page_table.slots(batch, token_positions(batch)))
        kv_lens = batch.start_positions + batch.query_lens
        n = batch.num_decodes
        whole = batch.rows.size == n
        self._decodes = [
            self._decode_group(
                None if whole and len(group) == n else group, batch, kv_lens, page_table
            )
            for group in _groups_of_like_length(kv_lens[:n], page_table.page_size)
        ]
        ends = np.cumsum(batch.query_lens).tolist()
        self._prefills = [
            self._prefill_chunk(i, ends[i], batch, int(kv_lens[i]), page_table)
            for i in range(n, batch.rows.size)
        ]

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        """See AttentionBackend."""
        key_slots, value_slots = self._pool.slots[layer_id]
        key_slots.index_copy_(0, self._slots_T, k_TKD)
        value_slots.index_copy_(0, self._slots_T, v_TKD)
        if len(self._decodes) == 1 and self._decodes[0].tokens is None:
            return self._decode(q_THD, self._decodes[0], layer_id)
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for group in self._decodes:
            tokens = slice(None) if group.tokens is None else group.tokens
            out_THD[tokens] = self._decode(q_THD[tokens], group, layer_id)
        for chunk in self._prefills:
            part = slice(chunk.first, chunk.end)
            out_THD[part] = self._prefill(q_THD[part], k_TKD[part], v_TKD[part], chunk, layer_id)
        return out_THD

    def _decode(self, q_BHD: Tensor, group: _DecodeGroup, layer_id: int) -> Tensor:
        keys, values = self._read(group.own, layer_id)
        size, num_heads, head_dim = q_BHD.shape
        q_BKGD = q_BHD.view(size, keys.shape[1], -1, head_dim)
        if group.shared is None:
            out_BKGD = F.scaled_dot_product_attention(q_BKGD, keys, values, attn_mask=group.mask)
        else:
            shared = self._read(group.shared, layer_id)
            out_BKGD = _attend_in_two_parts(q_BKGD, shared, (keys, values), group.mask)
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
        """Keys and values of whole pages, each [B, K, C, D], good until the next read."""
        keys, values = self._pool.pages[layer_id]
        torch.index_select(keys, 0, gather.pages, out=gather.keys)
        torch.index_select(values, 0, gather.pages, out=gather.values)
        shape = (gather.num_sequences, -1, *keys.shape[2:])
        return gather.keys.view(shape).transpose(1, 2), gather.values.view(shape).transpose(1, 2)

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
        batch: ForwardBatch,
        kv_lens: Int32Array,
        page_table: PageTable,
    ) -> _DecodeGroup:
        chosen = slice(None) if group is None else group
        lens = kv_lens[chosen]
        page_size = page_table.page_size
        pages = page_table.pages_of(batch.rows[chosen], lens)
        num_shared = self._num_shared_pages(pages, lens, page_size)
        own = pages[:, num_shared:]
        mask = self._mask(lens - num_shared * page_size, own.shape[1] * page_size)
        return _DecodeGroup(
            tokens=None if group is None else self._to_device(group),
            shared=self._gather(pages[:1, :num_shared]) if num_shared else None,
            own=self._gather(own),
            mask=mask[:, None, None],
        )

    def _num_shared_pages(self, pages: Int64Array, kv_lens: Int32Array, page_size: int) -> int:
        """Leading pages that all sequences have in common, or 0 where it does not pay.

        The last token of each sequence is left to its own part, which is then never empty.
        """
        if len(pages) == 1 or self._device.type != "cpu":
            return 0
        same = (pages == pages[0]).all(0)[: (int(kv_lens.min()) - 1) // page_size]
        num_shared = int(same.argmin()) if not same.all() else same.size
        saved = num_shared * page_size * (len(pages) - 1)
        return num_shared if saved >= _LEAST_TOKENS_SAVED else 0

    def _prefill_chunk(
        self, index: int, end: int, batch: ForwardBatch, kv_len: int, page_table: PageTable
    ) -> _PrefillChunk:
        length = int(batch.query_lens[index])
        if length == kv_len:
            return _PrefillChunk(end - length, end, None, kv_len, None)
        pages = page_table.pages_of(batch.rows[index : index + 1], np.array([kv_len], np.int32))
        visible = np.arange(kv_len - length + 1, kv_len + 1, dtype=np.int32)
        return _PrefillChunk(
            end - length, end, self._gather(pages), kv_len, self._mask(visible, kv_len)
        )

    def _mask(self, visible: Int32Array, length: int) -> Tensor:
        """0 for the first `visible[i]` of `length` places, minus infinity after, [any, length]."""
        hidden = np.arange(length, dtype=np.int32) >= visible[:, None]
        zeros = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(self._to_device(hidden), -torch.inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _attend_in_two_parts(
    q_BKGD: Tensor, shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """Attention over the shared keys [1, K, C, D], then each sequence's own [B, K, C, D]."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    size, num_kv_heads, group_size, head_dim = q_BKGD.shape
    every_q = q_BKGD.transpose(0, 1).reshape(1, num_kv_heads, -1, head_dim)
    shared_out, shared_lse = attend(every_q, *shared)
    out_BKGD, lse_BKG = attend(q_BKGD, *own, attn_mask=mask)
    shape = (num_kv_heads, size, group_size)
    shared_weight = torch.sigmoid(shared_lse.view(shape).transpose(0, 1) - lse_BKG).unsqueeze(-1)
    shared_BKGD = shared_out.view(*shape, head_dim).transpose(0, 1)
    merged: Tensor = out_BKGD.float().lerp_(shared_BKGD.float(), shared_weight)
    return merged.to(q_BKGD.dtype)


def _groups_of_like_length(kv_lens: Int32Array, page_size: int) -> list[Int32Array]:
    """Indices into `kv_lens` in groups whose longest is at most about twice the shortest."""
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
