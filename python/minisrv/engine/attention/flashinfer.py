"""Attention on a GPU by FlashInfer (Ye et al., FlashInfer, 2025).

Decodes and prefill chunks are two calls per layer, each prepared once per step: a single call would
choose its tile size for the average query, and decodes would use tiles made for chunks. Chunks use
the FA2 prefill kernel; for decodes see `decode_kernels`.
"""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size, B sequences.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minisrv.engine.attention.decode_kernels import make_decode_kernel
from minisrv.engine.attention.flashinfer_plan import (
    FlashInferSetting,
    PinnedRing,
    explaining_failures,
    plan_fa2_in_graph,
)
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.step_buffer import SentStep, StepTensors


class FlashInferAttention:
    """A DeviceAttention, planned from a step's words on the host and a page list on the device,
    which need not be filled before `begin`. Raises ImportError if flashinfer is not installed.

    num_bytes: size of the workspace; see `workspace_bytes`. decode_kernel: as --decode-kernel.
    """

    def __init__(
        self, pool: KVPool, num_heads: int, num_bytes: int, decode_kernel: str = "auto"
    ) -> None:
        self._pool = pool
        setting = self._setting = FlashInferSetting.of(pool, num_heads, num_bytes)
        self._decode = make_decode_kernel(decode_kernel, setting)
        self._prefill = self._eager_prefill = setting.library.BatchPrefillWithPagedKVCacheWrapper(
            setting.workspace, "NHD", backend="fa2"
        )
        self._prefill_ring = PinnedRing(self._eager_prefill)
        self._graph_prefills: dict[tuple[int, int], Any] = {}
        self._num_decodes = self._num_tokens = 0
        self._has_prefills = False
        self._tensors: StepTensors | None = None

    def read_from(self, tensors: StepTensors) -> None:
        self._tensors = tensors
        self._decode.read_from(tensors)

    def plan(self, step: SentStep) -> None:
        self._note(step)
        self._prefill = self._eager_prefill
        with explaining_failures("use --attention-backend torch_native"):
            if step.num_decodes:
                self._decode.plan(step)
            if step.num_prefills:
                self._plan_prefills(step)

    def plan_for_graph(self, step: SentStep) -> None:
        """For a padded step whose forward is in a CUDA graph or being recorded."""
        self._note(step)
        with explaining_failures("use a lower --cuda-graph-max-bs, or 0 to run without graphs"):
            if step.num_decodes:
                self._decode.plan_for_graph(step)
            if step.num_prefills:
                self._plan_graph_prefills(step)

    def begin(self) -> None:
        if self._num_decodes:
            self._decode.begin()

    def cache_slots(self, layer_id: int) -> CacheSlots:
        assert self._tensors is not None
        slots_T = self._tensors.slots_T[: self._num_tokens]
        return CacheSlots(slots_T, *self._pool.slots[layer_id])

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        pages, n = self._pool.pages[layer_id], self._num_decodes
        if n:
            self._decode.run(q_THD[:n], pages, out_THD[:n])
        if self._has_prefills:
            self._prefill.run(q_THD[n:], pages, out=out_THD[n:])
        return out_THD

    def _note(self, step: SentStep) -> None:
        self._num_decodes, self._num_tokens = step.num_decodes, step.num_tokens
        self._has_prefills = bool(step.num_prefills)

    def _plan_prefills(self, step: SentStep, **options: Any) -> None:
        assert self._tensors is not None
        n, count = step.num_decodes, step.num_prefills
        # A graph reads the page list in place; if it were passed, it would be copied onto itself.
        num_pages = step.num_pages if self._prefill is self._eager_prefill else 0
        with self._prefill_ring.lent_to(self._prefill):
            self._prefill.plan(
                step.host["prefill_query_starts"][: count + 1],
                step.host["page_starts"][n : n + count + 1],
                self._tensors.pages[:num_pages],
                step.host["last_page_lens"][n : n + count],
                *self._setting.heads,
                causal=True,
                **self._setting.types,
                **options,
            )

    def _plan_graph_prefills(self, step: SentStep) -> None:
        """The chunks have as many tokens together as in the step that was recorded, however they
        are distributed, so the plan differs only in what the graph reads when it runs.
        """
        n, count = step.num_decodes, step.num_prefills
        num_queries = step.num_tokens - n
        found = self._graph_prefills.get((n, num_queries))
        if found is None:
            self._prefill = self._make_graph_prefill(n, count)
            self._graph_prefills[n, num_queries] = self._prefill
            self._plan_prefills(step, disable_split_kv=True)
        else:
            self._prefill = found
        with self._prefill_ring.lent_to(self._prefill):
            plan_fa2_in_graph(
                self._prefill,
                self._setting.heads,
                step.host["prefill_query_starts"][: count + 1],
                step.host["page_starts"][n : n + count + 1],
                step.kv_lens[n:],
                num_queries=num_queries,
                causal=True,
                uniform_q_len=0,
            )

    def _make_graph_prefill(self, num_decodes: int, count: int) -> Any:
        """As for decodes; the tables of the chunks lie behind those of `num_decodes` decodes."""
        assert self._tensors is not None
        words, end = self._tensors.words, num_decodes + count
        wrapper = self._setting.library.BatchPrefillWithPagedKVCacheWrapper(
            self._setting.workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=words["prefill_query_starts"][: count + 1],
            paged_kv_indptr_buf=words["page_starts"][num_decodes : end + 1],
            paged_kv_indices_buf=self._tensors.pages,
            paged_kv_last_page_len_buf=words["last_page_lens"][num_decodes:end],
            backend="fa2",
        )
        wrapper._int_workspace_buffer = self._eager_prefill._int_workspace_buffer
        return wrapper
