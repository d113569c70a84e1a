"""FlashInfer with its real Python and its real planner; only the compiled kernels are missing.

In their place stand functions that hold each call to what the C++ behind it reads: device, dtype,
shape, stride, alignment, and that the plan in the workspace belongs to the tables and tensors of
the call. In a CUDA graph that is checked again at each replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.gpu_dry_run.fake_cuda import FakeGPU, Violation
from tests.gpu_dry_run.planner import Planner, Request

_HALF_TYPES = (torch.bfloat16, torch.float16)
_VECTOR_BYTES = 16
# Of a plan's numbers, see PrefillPlanInfo in FlashInfer's scheduler.cuh.
_NUM_ROWS, _IN_GRAPH, _SPLITS = 1, 13, 14


class Plan(list[int]):
    """What `plan` returns to FlashInfer's wrapper, which hands it on to `run`."""

    def __init__(
        self, numbers: list[int], request: Request, kv_lens: np.ndarray, causal: bool
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
class _Types:
    query: torch.dtype
    cache: torch.dtype
    out: torch.dtype
    index: torch.dtype
    head_dim: int


def _uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a method asks of torch is for its checks."""

    @functools.wraps(function)
    def method(module: _AttentionModule, *args: Any) -> Any:
        with module.gpu.uncounted():
            return function(module, *args)

    return method


class _AttentionModule:
    """The module of gen_batch_prefill_module."""

    def __init__(self, gpu: FakeGPU, planner: Planner, plans: Plans, types: _Types) -> None:
        self.gpu, self._planner, self._plans, self._types = gpu, planner, plans, types

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
        for workspace in (float_workspace, int_workspace):
            self._require(workspace, "a workspace", torch.uint8)
        _require(self.gpu.is_pinned(pinned), "the plan's host buffer is not pinned")
        _require(pinned.nbytes >= int_workspace.nbytes, "the plan's host buffer is too small")
        for name, table in (("queries", query_starts), ("pages", page_starts), ("lens", kv_lens)):
            _require_host_table(table, name)
        _require(len(query_starts) == len(page_starts) == batch_size + 1, "tables of other sizes")
        _require(int(query_starts[-1]) == num_rows, "the plan has another number of queries")
        _require(causal or num_rows == batch_size, "several queries without a mask")
        _require(head_dim_qk == head_dim_vo == self._types.head_dim, "another head size")
        _require((window_left, fixed_split_size, num_colocated_ctas) == (-1, -1, 0), "options")
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
        self.gpu.upload(pinned[: planned.int_bytes], None, True)
        plan = Plan(planned.info, request, lens, causal)
        self._plans.held[_memory(int_workspace)] = plan
        self._plans.num_planned += 1
        self._plans.largest_float_bytes = max(self._plans.largest_float_bytes, planned.float_bytes)
        return plan

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
        types, request = self._types, plan.request
        for workspace in (float_workspace, int_workspace):
            self._require(workspace, "a workspace", torch.uint8)
        tables = query_starts, page_starts, pages, last_page_lens
        for table in tables:
            self._require(table, "a table of attention", types.index)
            _require(table.is_contiguous(), "a table of attention has gaps")
        self._require(q, "the queries", types.query)
        self._require(out, "the output", types.out)
        for cache in (keys, values):
            self._require(cache, "the cache", types.cache)
        expected = request.num_kv_heads, types.head_dim
        _require(layout == 0 and tuple(keys.shape[2:]) == expected, "a cache of other heads")
        _require(keys.shape[1] == request.page_size, "the plan has another page size")
        _require(keys.shape == values.shape, "keys and values of other shapes")
        _require(keys.stride() == values.stride(), "keys and values of other strides")
        _require(
            tuple(q.shape) == (plan[_NUM_ROWS], request.num_heads, types.head_dim),
            f"the plan is for {plan[_NUM_ROWS]} queries of {request.num_heads} heads, "
            f"and these have the shape {tuple(q.shape)}",
        )
        _require(out.shape == q.shape and out.is_contiguous(), "the output is not as the queries")
        for tensor in (q, keys, values, out):
            _require_vectors(tensor)
        _require(lse is None and window_left == -1, "options")
        _require(mask_mode == int(plan.causal), "another mask than planned")
        _require(self.gpu.recording is None or bool(plan[_IN_GRAPH]), "an eager plan in a graph")
        check = _Check(self.gpu, self._plans, plan, _memory(int_workspace), tables)
        check()
        if self.gpu.recording is not None:
            self.gpu.recording.checks.append(check)
        self.gpu.launch("flashinfer::attention")
        if plan[_SPLITS]:
            self.gpu.launch("flashinfer::merge_splits")

    def ragged_run(self, *args: Any) -> None:
        raise Violation("attention over a cache without pages")

    def _require(self, tensor: Any, name: str, dtype: torch.dtype) -> None:
        self.gpu.require_on_device(tensor, name)
        _require(tensor.dtype is dtype, f"{name} has dtype {tensor.dtype}, not {dtype}")


@dataclass(frozen=True)
class _Check:
    """What an attention kernel finds on the device when it runs."""

    gpu: FakeGPU
    plans: Plans
    first: Plan
    int_workspace: int
    tables: tuple[Tensor, Tensor, Tensor, Tensor]

    def __call__(self) -> None:
        plan = self.plans.held[self.int_workspace]
        if list(plan) != list(self.first):
            raise Violation(f"a plan that its launch was not made for: {plan}, not {self.first}")
        made, now = self.first.request, plan.request
        same = (made.page_size, made.num_heads, made.num_kv_heads, made.in_graph)
        _require(same == (now.page_size, now.num_heads, now.num_kv_heads, now.in_graph), "plans")
        query_starts, page_starts, pages, last_page_lens = self.tables
        for table, planned in (
            (query_starts, now.query_starts),
            (page_starts, now.page_starts),
            (last_page_lens, plan.kv_lens - (np.diff(now.page_starts) - 1).clip(0) * now.page_size),
        ):
            _require(len(table) == len(planned), "the plan is for another number of sequences")
            sent = self.gpu.content(table)
            if sent is not None and not np.array_equal(sent.numpy(), planned):
                raise Violation(f"the device has the table {sent}, the plan was made for {planned}")
        _require(len(pages) >= now.page_starts[-1], "the list of pages is too short")


class _Operators:
    """The functions of the modules for norms and the activation."""

    def __init__(self, gpu: FakeGPU) -> None:
        self._gpu = gpu

    def rmsnorm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float, pdl: bool) -> None:
        self._require_rows("rmsnorm", x, out)
        self._require_weight("rmsnorm", x, weight)
        self._gpu.launch("flashinfer::rmsnorm")

    def fused_add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool
    ) -> None:
        self._require_rows("fused_add_rmsnorm", x, residual)
        self._require_weight("fused_add_rmsnorm", x, weight)
        self._gpu.launch("flashinfer::fused_add_rmsnorm")

    def silu_and_mul(self, out: Tensor, x: Tensor, pdl: bool) -> None:
        for tensor in (out, x):
            self._require_half("silu_and_mul", tensor)
            _require(tensor.is_contiguous(), "silu_and_mul of a tensor with gaps")
        _require(x.dtype is out.dtype, "silu_and_mul of other dtypes")
        _require(x.numel() == 2 * out.numel(), "silu_and_mul of other shapes")
        self._gpu.launch("flashinfer::silu_and_mul")

    def _require_rows(self, name: str, x: Tensor, other: Tensor) -> None:
        for tensor in (x, other):
            self._require_half(name, tensor)
            _require(tensor.dim() == 2 and tensor.stride(1) == 1, f"{name} of rows with gaps")
        _require(x.dtype is other.dtype and x.shape == other.shape, f"{name} of other shapes")

    def _require_weight(self, name: str, x: Tensor, weight: Tensor) -> None:
        self._require_half(name, weight)
        _require(weight.dtype is x.dtype, f"{name} with a weight of another dtype")
        _require(tuple(weight.shape) == tuple(x.shape[1:]), f"{name} with a weight of another size")
        _require(weight.is_contiguous(), f"{name} with a weight with gaps")

    def _require_half(self, name: str, tensor: Tensor) -> None:
        self._gpu.require_on_device(tensor, f"an operand of {name}")
        _require(tensor.dtype in _HALF_TYPES, f"{name} of {tensor.dtype}")
        _require_vectors(tensor)


@contextmanager
def fake_flashinfer(gpu: FakeGPU, planner: Planner) -> Iterator[Plans]:
    """Within the context, FlashInfer's modules are these; yields what was planned."""
    import flashinfer.activation
    import flashinfer.norm
    import flashinfer.prefill

    plans, operators = Plans(), _Operators(gpu)

    def attention_module(backend: str, *types: Any) -> Any:
        _require(backend == "fa2", f"attention by {backend}")
        query, cache, out, index, head_dim, head_dim_vo, *variant = types
        _require(head_dim == head_dim_vo, "a head size of its own for values")
        # No position encoding, no sliding window, no soft cap, no 16-bit reduction.
        _require(not any(variant), f"attention of the variant {variant}")
        module = _AttentionModule(gpu, planner, plans, _Types(query, cache, out, index, head_dim))
        return SimpleNamespace(build_and_load=lambda: module)

    def operator_module(*names: str) -> Any:
        return SimpleNamespace(build_and_load=lambda: operators)

    caches = (
        flashinfer.prefill.get_batch_prefill_module,
        flashinfer.norm.get_norm_module,
        flashinfer.activation.get_act_and_mul_module,
    )
    generators = (
        (flashinfer.prefill, "gen_batch_prefill_module", attention_module),
        (flashinfer.norm, "gen_norm_module", operator_module),
        (flashinfer.norm, "_USE_CUDA_NORM", True),
        (flashinfer.activation, "gen_act_and_mul_module", operator_module),
    )
    with ExitStack() as patches:
        for module, name, value in generators:
            patches.enter_context(mock.patch.object(module, name, value))
        for cached in caches:
            cached.cache_clear()
            patches.callback(cached.cache_clear)
        yield plans


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Violation(f"FlashInfer is called wrongly: {what}")


def _require_host_table(table: Tensor, name: str) -> None:
    on_host = type(table) is Tensor and table.device.type == "cpu"
    right = on_host and table.dtype is torch.int32 and table.is_contiguous()
    _require(right, f"the plan's {name} are not int32 in host memory")


def _require_vectors(tensor: Tensor) -> None:
    """Rows are read in vectors of 16 bytes."""
    size = tensor.element_size()
    offsets = [tensor.storage_offset(), *tensor.stride()[:-1]]
    aligned = all(offset * size % _VECTOR_BYTES == 0 for offset in offsets)
    _require(aligned and tensor.stride(-1) == 1, f"rows that are not aligned: {tensor.stride()}")
