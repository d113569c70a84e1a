"""The modules of FlashInfer for attention, with its real planner and without kernels.

The functions hold each call to what the C++ behind it reads: device, dtype, shape, stride,
alignment, and that the plan in the workspace belongs to the tables and tensors of the call. In a
CUDA graph that is checked again at each replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.gpu_dry_run.fake_cuda import FakeGPU, Violation
from tests.gpu_dry_run.planner import Planned, Planner, Request

_VECTOR_BYTES = 16
# Of a plan's numbers, see PrefillPlanInfo and DecodePlanInfo in FlashInfer's scheduler.cuh.
_NUM_ROWS, _SPLITS, _DECODE_SPLITS = 1, 14, 9
# Where queries start, where the pages of sequences start, pages, tokens in the last pages. All
# sequences of a decode kernel have one query.
Tables = tuple[Tensor | None, Tensor, Tensor, Tensor]


class Plan(list[int]):
    """What `plan` returns to FlashInfer's wrapper, which hands it on to `run`.

    kv_lens: None if the planner was told only the pages.
    """

    def __init__(
        self, numbers: list[int], request: Request, kv_lens: np.ndarray | None, causal: bool
    ) -> None:
        super().__init__(numbers)
        self.request, self.kv_lens, self.causal = request, kv_lens, causal


@dataclass
class Plans:
    """The plan that each int workspace holds, and the most that any plan took."""

    held: dict[int, Plan] = field(default_factory=dict)
    largest_float_bytes: int = 0
    num_planned: int = 0


@dataclass(frozen=True)
class Types:
    query: torch.dtype
    cache: torch.dtype
    out: torch.dtype
    index: torch.dtype
    head_dim: int


def _uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a method asks of torch is for its checks."""

    @functools.wraps(function)
    def method(module: _Module, *args: Any) -> Any:
        with module.gpu.uncounted():
            return function(module, *args)

    return method


class _Module:
    """A module for attention."""

    def __init__(self, gpu: FakeGPU, planner: Planner, plans: Plans, types: Types) -> None:
        self.gpu, self._planner, self._plans, self._types = gpu, planner, plans, types

    def _require_buffers(self, float_workspace: Tensor, workspace: Tensor, pinned: Tensor) -> None:
        for buffer in (float_workspace, workspace):
            self._require(buffer, "a workspace", torch.uint8)
        require(self.gpu.is_pinned(pinned), "the plan's host buffer is not pinned")
        require(pinned.nbytes >= workspace.nbytes, "the plan's host buffer is too small")

    def _keep(self, plan: Plan, planned: Planned, int_workspace: Tensor, pinned: Tensor) -> Plan:
        """Send a plan to its workspace."""
        self.gpu.upload(pinned[: planned.int_bytes], None, True)
        self._plans.held[_memory(int_workspace)] = plan
        self._plans.num_planned += 1
        self._plans.largest_float_bytes = max(self._plans.largest_float_bytes, planned.float_bytes)
        return plan

    def _require_tensors(
        self, request: Request, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, num_rows: int
    ) -> None:
        types = self._types
        self._require(q, "the queries", types.query)
        self._require(out, "the output", types.out)
        for cache in (keys, values):
            self._require(cache, "the cache", types.cache)
        expected = request.num_kv_heads, types.head_dim
        require(tuple(keys.shape[2:]) == expected, "a cache of other heads")
        require(keys.shape[1] == request.page_size, "the plan has another page size")
        require(keys.shape == values.shape, "keys and values of other shapes")
        require(keys.stride() == values.stride(), "keys and values of other strides")
        require(
            tuple(q.shape) == (num_rows, request.num_heads, types.head_dim),
            f"the plan is for {num_rows} queries of {request.num_heads} heads, "
            f"and these have the shape {tuple(q.shape)}",
        )
        require(out.shape == q.shape and out.is_contiguous(), "the output is not as the queries")
        for tensor in (q, keys, values, out):
            require_vectors(tensor)

    def _run(self, plan: Plan, int_workspace: Tensor, tables: Tables, splits: bool) -> None:
        for table in tables:
            if table is None:
                continue
            self._require(table, "a table of attention", self._types.index)
            require(table.is_contiguous(), "a table of attention has gaps")
        check = _Check(self.gpu, self._plans, plan, _memory(int_workspace), tables)
        check()
        if self.gpu.recording is not None:
            require(plan.request.in_graph, "an eager plan in a graph")
            self.gpu.recording.checks.append(check)
        self.gpu.launch("flashinfer::attention")
        if splits:
            self.gpu.launch("flashinfer::merge_splits")

    def _require(self, tensor: Any, name: str, dtype: torch.dtype) -> None:
        self.gpu.require_on_device(tensor, name)
        require(tensor.dtype is dtype, f"{name} has dtype {tensor.dtype}, not {dtype}")


class PrefillModule(_Module):
    """The module of gen_batch_prefill_module."""

    @_uncounted
    def plan(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        pinned: Tensor,
        query_starts: Tensor,
        page_starts: Tensor,
        kv_lens: Tensor,
        num_rows: int,
        batch_size: int,
        num_heads: int,
        num_kv_heads: int,
        page_size: int,
        in_graph: bool,
        head_dim_qk: int,
        head_dim_vo: int,
        causal: bool,
        window_left: int,
        fixed_split_size: int,
        disable_split_kv: bool,
        num_colocated_ctas: int,
        uniform_q_len: int,
    ) -> Plan:
        self._require_buffers(float_workspace, int_workspace, pinned)
        for name, table in (("queries", query_starts), ("pages", page_starts), ("lens", kv_lens)):
            _require_host_table(table, name)
        require(len(query_starts) == len(page_starts) == batch_size + 1, "tables of other sizes")
        require(int(query_starts[-1]) == num_rows, "the plan has another number of queries")
        require(causal or num_rows == batch_size, "several queries without a mask")
        require(head_dim_qk == head_dim_vo == self._types.head_dim, "another head size")
        require((window_left, fixed_split_size, num_colocated_ctas) == (-1, -1, 0), "options")
        lens = kv_lens.numpy().copy()
        pages = np.diff(page_starts.numpy())
        if not np.array_equal(pages, -(-lens // page_size)):
            raise Violation(f"a plan with pages of {page_size} tokens for other numbers of pages")
        request = Request(
            query_starts=query_starts.numpy().copy(),
            page_starts=page_starts.numpy().copy(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            in_graph=in_graph,
            uniform_q_len=uniform_q_len,
            disable_split_kv=disable_split_kv,
            kv_dtype_bytes=self._types.cache.itemsize,
        )
        planned = self._planner.plan(request, float_workspace.numel(), pinned.numpy())
        plan = Plan(planned.info, request, lens, causal)
        return self._keep(plan, planned, int_workspace, pinned)

    @_uncounted
    def paged_run(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        plan: Plan,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        query_starts: Tensor,
        page_starts: Tensor,
        pages: Tensor,
        last_page_lens: Tensor,
        out: Tensor,
        lse: Tensor | None,
        mask_mode: int,
        layout: int,
        window_left: int,
        enable_pdl: bool,
        *options: Any,
    ) -> None:
        for workspace in (float_workspace, int_workspace):
            self._require(workspace, "a workspace", torch.uint8)
        self._require_tensors(plan.request, q, keys, values, out, plan[_NUM_ROWS])
        require(lse is None and (layout, window_left) == (0, -1), "options")
        require(mask_mode == int(plan.causal), "another mask than planned")
        tables = query_starts, page_starts, pages, last_page_lens
        self._run(plan, int_workspace, tables, bool(plan[_SPLITS]))

    def ragged_run(self, *args: Any) -> None:
        raise Violation("attention over a cache without pages")


class DecodeModule(_Module):
    """The module of gen_batch_decode_module, for CUDA cores."""

    @_uncounted
    def plan(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        pinned: Tensor,
        page_starts: Tensor,
        batch_size: int,
        num_heads: int,
        num_kv_heads: int,
        page_size: int,
        in_graph: bool,
        window_left: int,
        logits_soft_cap: float,
        head_dim_qk: int,
        head_dim_vo: int,
        empty_q: Tensor,
        empty_kv: Tensor,
    ) -> Plan:
        types = self._types
        self._require_buffers(float_workspace, int_workspace, pinned)
        _require_host_table(page_starts, "pages")
        require(len(page_starts) == batch_size + 1, "tables of other sizes")
        require(head_dim_qk == head_dim_vo == types.head_dim, "another head size")
        require((window_left, logits_soft_cap) == (-1, 0.0), "options")
        require((empty_q.dtype, empty_kv.dtype) == (types.query, types.cache), "other dtypes")
        request = Request(
            query_starts=np.arange(batch_size + 1, dtype=np.int32),
            page_starts=page_starts.numpy().copy(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            in_graph=in_graph,
            kv_dtype_bytes=types.cache.itemsize,
        )
        planned = self._planner.plan_decode(request, float_workspace.numel(), pinned.numpy())
        plan = Plan(planned.info, request, None, causal=False)
        return self._keep(plan, planned, int_workspace, pinned)

    @_uncounted
    def run(
        self,
        float_workspace: Tensor,
        int_workspace: Tensor,
        plan: Plan,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        page_starts: Tensor,
        pages: Tensor,
        last_page_lens: Tensor,
        out: Tensor,
        lse: Tensor | None,
        layout: int,
        window_left: int,
        enable_pdl: bool,
        *options: Any,
    ) -> None:
        for workspace in (float_workspace, int_workspace):
            self._require(workspace, "a workspace", torch.uint8)
        num_rows = len(plan.request.page_starts) - 1
        self._require_tensors(plan.request, q, keys, values, out, num_rows)
        require(lse is None and (layout, window_left) == (0, -1), "options")
        self._run(
            plan,
            int_workspace,
            (None, page_starts, pages, last_page_lens),
            bool(plan[_DECODE_SPLITS]),
        )


@dataclass(frozen=True)
class _Check:
    """What an attention kernel finds on the device when it runs."""

    gpu: FakeGPU
    plans: Plans
    first: Plan
    int_workspace: int
    tables: Tables

    def __call__(self) -> None:
        plan = self.plans.held[self.int_workspace]
        if list(plan) != list(self.first):
            raise Violation(f"a plan that its launch was not made for: {plan}, not {self.first}")
        made, now = self.first.request, plan.request
        same = (made.page_size, made.num_heads, made.num_kv_heads, made.in_graph)
        require(same == (now.page_size, now.num_heads, now.num_kv_heads, now.in_graph), "plans")
        query_starts, page_starts, pages, last_page_lens = self.tables
        if query_starts is not None:
            self._require_content(query_starts, now.query_starts)
        self._require_content(page_starts, now.page_starts)
        if plan.kv_lens is not None:
            full_pages = (np.diff(now.page_starts) - 1).clip(0)
            self._require_content(last_page_lens, plan.kv_lens - full_pages * now.page_size)
        require(len(last_page_lens) == len(now.page_starts) - 1, "another number of sequences")
        require(len(pages) >= now.page_starts[-1], "the list of pages is too short")

    def _require_content(self, table: Tensor, planned: np.ndarray) -> None:
        require(len(table) == len(planned), "the plan is for another number of sequences")
        sent = self.gpu.content(table)
        if sent is not None and not np.array_equal(sent.numpy(), planned):
            raise Violation(f"the device has the table {sent}, the plan was made for {planned}")


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Violation(f"FlashInfer is called wrongly: {what}")


def _require_host_table(table: Tensor, name: str) -> None:
    on_host = type(table) is Tensor and table.device.type == "cpu"
    right = on_host and table.dtype is torch.int32 and table.is_contiguous()
    require(right, f"the plan's {name} are not int32 in host memory")


def require_vectors(tensor: Tensor) -> None:
    """Rows are read in vectors of 16 bytes."""
    size = tensor.element_size()
    offsets = [tensor.storage_offset(), *tensor.stride()[:-1]]
    aligned = all(offset * size % _VECTOR_BYTES == 0 for offset in offsets)
    require(aligned and tensor.stride(-1) == 1, f"rows that are not aligned: {tensor.stride()}")
