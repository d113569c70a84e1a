"""How the plans of FlashInfer's FA2 kernels are made and sent to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisrv.engine.flashinfer_library import import_flashinfer
from minisrv.engine.kv_pool import KVPool
from minisrv.errors import EngineDeadError

_PLANS_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True)
class FlashInferSetting:
    """What all calls of FlashInfer have in common.

    heads: query heads, key heads, head size, page size. types: keywords of a wrapper's `plan`.
    """

    library: Any
    heads: tuple[int, int, int, int]
    types: dict[str, torch.dtype]
    workspace: Tensor

    @classmethod
    def of(cls, pool: KVPool, num_heads: int, num_bytes: int) -> FlashInferSetting:
        """Raises ImportError if flashinfer is not installed. num_bytes: of the workspace."""
        return cls(
            import_flashinfer(),
            (num_heads, pool.num_kv_heads, pool.head_dim, pool.page_size),
            {"q_data_type": pool.dtype, "kv_data_type": pool.stored_dtype},
            torch.zeros(num_bytes, dtype=torch.uint8, device=pool.device),
        )


@contextmanager
def explaining_failures(remedy: str) -> Iterator[None]:
    """Raise EngineDeadError with the option to change, where FlashInfer's planner fails."""
    try:
        yield
    except RuntimeError as error:
        raise EngineDeadError(
            f"FlashInfer cannot plan the attention of a step: {error}; {remedy}"
        ) from error


class PinnedRing:
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


def plan_fa2_in_graph(
    wrapper: Any,
    heads: tuple[int, int, int, int],
    query_starts: Tensor,
    page_starts: Tensor,
    kv_lens: Tensor,
    *,
    num_queries: int,
    causal: bool,
    uniform_q_len: int,
) -> None:
    """Call the private function behind `wrapper.plan`. It takes only positional arguments."""
    num_heads, num_kv_heads, head_dim, page_size = heads
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
