"""Attention on a GPU by FlashInfer's FA2 kernels (Ye et al., FlashInfer, 2025).

Decodes and prefill chunks are two calls per layer, each planned once per step: a single call would
choose its tile size for the average query, and decodes would use tiles made for chunks. Both calls
use the prefill kernel, which packs the query heads of a key head into rows: it supports all group
sizes, and only one module has to be compiled.
"""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size, B sequences.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minisrv.engine.flashinfer_library import import_flashinfer
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.step_buffer import SentStep, StepTensors
from minisrv.errors import EngineDeadError

_PLANS_IN_FLIGHT = 3


class FlashInferAttention:
    """A DeviceAttention, planned from a step's words on the host and a page list on the device,
    which need not be filled before `forward`. Raises ImportError if flashinfer is not installed.

    num_bytes: size of the workspace; see `workspace_bytes`.
    """

    def __init__(self, pool: KVPool, num_heads: int, num_bytes: int) -> None:
        flashinfer = self._flashinfer = import_flashinfer()
        self._pool = pool
        self._heads = (num_heads, pool.num_kv_heads, pool.head_dim, pool.page_size)
        self._types = {"q_data_type": pool.dtype, "kv_data_type": pool.stored_dtype}
        self._workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=pool.device)
        self._eager_decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._eager_prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", backend="fa2"
        )
        self._decode_ring = _PinnedRing(self._eager_decode)
        self._prefill_ring = _PinnedRing(self._eager_prefill)
        self._decode, self._prefill = self._eager_decode, self._eager_prefill
        self._graph_decodes: dict[int, Any] = {}
        self._graph_prefills: dict[tuple[int, int], Any] = {}
        self._num_decodes = self._num_tokens = 0
        self._has_prefills = False
        self._tensors: StepTensors | None = None

    def read_from(self, tensors: StepTensors) -> None:
        self._tensors = tensors

    def plan(self, step: SentStep) -> None:
        self._begin(step)
        self._decode, self._prefill = self._eager_decode, self._eager_prefill
        with _explaining_failures("use --attention-backend torch_native"):
            if step.num_decodes:
                self._plan_decodes(self._decode, step)
            if step.num_prefills:
                self._plan_prefills(self._prefill, step)

    def plan_for_graph(self, step: SentStep) -> None:
        """For a padded step whose forward is in a CUDA graph or being recorded.

        The plan is that of the function behind the wrapper's `plan`, which writes the split of the
        work to where the graph reads it. The wrapper's own is called once per shape, because it
        also sets the arguments that `forward` passes to the kernel; the graph keeps those.
        """
        self._begin(step)
        with _explaining_failures("use a lower --cuda-graph-max-bs, or 0 to run without graphs"):
            if step.num_decodes:
                self._plan_graph_decodes(step)
            if step.num_prefills:
                self._plan_graph_prefills(step)

    def cache_slots(self, layer_id: int) -> CacheSlots:
        assert self._tensors is not None
        slots_T = self._tensors.slots_T[: self._num_tokens]
        return CacheSlots(slots_T, *self._pool.slots[layer_id])

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        pages, n = self._pool.pages[layer_id], self._num_decodes
        if n:
            self._decode.run(q_THD[:n], pages, out=out_THD[:n])
        if self._has_prefills:
            self._prefill.run(q_THD[n:], pages, out=out_THD[n:])
        return out_THD

    def _begin(self, step: SentStep) -> None:
        self._num_decodes, self._num_tokens = step.num_decodes, step.num_tokens
        self._has_prefills = bool(step.num_prefills)

    def _plan_decodes(self, wrapper: Any, step: SentStep, **options: Any) -> None:
        assert self._tensors is not None
        n = step.num_decodes
        # A graph reads the page list in place; if it were passed, it would be copied onto itself.
        num_pages = step.num_decode_pages if wrapper is self._eager_decode else 0
        with self._decode_ring.lent_to(wrapper):
            wrapper.plan(
                step.host["page_starts"][: n + 1],
                self._tensors.pages[:num_pages],
                step.host["last_page_lens"][:n],
                *self._heads,
                **self._types,
                **options,
            )

    def _plan_graph_decodes(self, step: SentStep) -> None:
        """Unlike the wrapper's plan, this one states that all sequences have one query, so the
        graph gets a tile per sequence and not one for each way in which queries might be
        distributed.
        """
        n = step.num_decodes
        wrapper = self._decode = self._graph_decodes.get(n)
        if wrapper is None:
            wrapper = self._decode = self._graph_decodes[n] = self._make_graph_decode(n)
            # Without splits it takes none of the workspace.
            self._plan_decodes(wrapper, step, disable_split_kv=True)
        with self._decode_ring.lent_to(wrapper):
            self._plan_in_graph(
                wrapper,
                torch.arange(n + 1, dtype=torch.int32),
                step.host["page_starts"][: n + 1],
                step.kv_lens[:n],
                num_queries=n,
                causal=False,  # not needed with one query
                uniform_q_len=1,
            )

    def _plan_graph_prefills(self, step: SentStep) -> None:
        """The chunks have as many tokens together as in the step that was recorded, however they
        are distributed, so the plan differs only in what the graph reads when it runs.
        """
        n, count = step.num_decodes, step.num_prefills
        num_queries = step.num_tokens - n
        wrapper = self._prefill = self._graph_prefills.get((n, num_queries))
        if wrapper is None:
            wrapper = self._prefill = self._make_graph_prefill(n, count)
            self._graph_prefills[n, num_queries] = wrapper
            self._plan_prefills(wrapper, step, disable_split_kv=True)
        with self._prefill_ring.lent_to(wrapper):
            self._plan_in_graph(
                wrapper,
                step.host["prefill_query_starts"][: count + 1],
                step.host["page_starts"][n : n + count + 1],
                step.kv_lens[n:],
                num_queries=num_queries,
                causal=True,
                uniform_q_len=0,
            )

    def _plan_in_graph(
        self,
        wrapper: Any,
        query_starts: Tensor,
        page_starts: Tensor,
        kv_lens: Tensor,
        *,
        num_queries: int,
        causal: bool,
        uniform_q_len: int,
    ) -> None:
        """Call the private function behind `wrapper.plan`. It takes only positional arguments."""
        num_heads, num_kv_heads, head_dim, page_size = self._heads
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer,
            query_starts,  # qo_indptr
            page_starts,  # kv_indptr
            kv_lens,  # kv_lens
            num_queries,  # total_num_rows
            len(kv_lens),  # batch_size
            num_heads,  # num_qo_heads
            num_kv_heads,  # num_kv_heads
            page_size,  # page_size
            True,  # enable_cuda_graph
            head_dim,  # head_dim_qk
            head_dim,  # head_dim_vo
            causal,  # causal
            -1,  # window_left: no window
            -1,  # fixed_split_size: none
            False,  # disable_split_kv
            0,  # num_colocated_ctas
            uniform_q_len,  # uniform_q_len: queries per sequence, or 0 if that varies
        )

    def _plan_prefills(self, wrapper: Any, step: SentStep, **options: Any) -> None:
        assert self._tensors is not None
        n, count = step.num_decodes, step.num_prefills
        num_pages = step.num_pages if wrapper is self._eager_prefill else 0
        with self._prefill_ring.lent_to(wrapper):
            wrapper.plan(
                step.host["prefill_query_starts"][: count + 1],
                step.host["page_starts"][n : n + count + 1],
                self._tensors.pages[:num_pages],
                step.host["last_page_lens"][n : n + count],
                *self._heads,
                causal=True,
                **self._types,
                **options,
            )

    def _make_graph_decode(self, size: int) -> Any:
        """FlashInfer needs one wrapper per size; they run one at a time and share their memory."""
        assert self._tensors is not None
        words = self._tensors.words
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=words["page_starts"][: size + 1],
            paged_kv_indices_buffer=self._tensors.pages,
            paged_kv_last_page_len_buffer=words["last_page_lens"][:size],
            backend="fa2",
        )
        wrapper._int_workspace_buffer = self._eager_decode._int_workspace_buffer
        return wrapper

    def _make_graph_prefill(self, num_decodes: int, count: int) -> Any:
        """As for decodes; the tables of the chunks lie behind those of `num_decodes` decodes."""
        assert self._tensors is not None
        words, end = self._tensors.words, num_decodes + count
        wrapper = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace,
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


@contextmanager
def _explaining_failures(remedy: str) -> Iterator[None]:
    """Raise EngineDeadError with the option to change, where FlashInfer's planner fails."""
    try:
        yield
    except RuntimeError as error:
        raise EngineDeadError(
            f"FlashInfer cannot plan the attention of a step: {error}; {remedy}"
        ) from error


class _PinnedRing:
    """A ring of host buffers for plans.

    A plan is copied to the device only when the stream reaches the copy. FlashInfer has a single
    buffer, which the next plan might overwrite before that. Here a buffer is reused once its copy,
    three plans ago, has finished.
    """

    def __init__(self, wrapper: Any) -> None:
        first = wrapper._pin_memory_int_workspace_buffer
        self._pinned: bool = first.is_pinned()
        self._buffers = [first]
        while len(self._buffers) < _PLANS_IN_FLIGHT:
            self._buffers.append(torch.empty_like(first, pin_memory=self._pinned))
        self._copied: list[Any] = [None] * _PLANS_IN_FLIGHT
        self._next = 0

    @contextmanager
    def lent_to(self, wrapper: Any) -> Iterator[None]:
        """Within the context, plans of `wrapper` are written to the next buffer."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        wrapper._pin_memory_int_workspace_buffer = self._buffers[self._next]
        yield
        if self._pinned:
            self._copied[self._next] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[self._next].record()
        self._next = (self._next + 1) % _PLANS_IN_FLIGHT
