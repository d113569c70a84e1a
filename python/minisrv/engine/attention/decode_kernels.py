"""Attention of the decodes of a step: the kernels of FlashInfer that --decode-kernel selects.

FA2 is FlashInfer's prefill kernel, which packs the query heads of a key head into the rows of a
tile: it runs on tensor cores, supports all group sizes, and shares its module with prompts. The
kernel for CUDA cores has a module of its own. Both are planned on the host once per step. XQA, by
TensorRT-LLM, is not planned: it reads lengths and page tables on the device.
"""

# Shapes: N decodes of a step, H query heads, D head size.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from minisrv.engine.attention.flashinfer_plan import (
    FlashInferSetting,
    PinnedRing,
    plan_fa2_in_graph,
)
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.step_buffer import SentStep, StepTensors

CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8)
XQA_PAGE_SIZES = (16, 32, 64, 128)
XQA_LARGEST_GROUP = 32
XQA_CAPABILITIES = (9, 10, 12)  # major versions


class DecodeKernel(Protocol):
    """The decodes are the first sequences of a step; there is at least one."""

    def read_from(self, tensors: StepTensors) -> None:
        """Set the tensors that hold the words and page lists of every step."""

    def plan(self, step: SentStep) -> None:
        """Prepare what all layers of an eager step share."""

    def plan_for_graph(self, step: SentStep) -> None:
        """As `plan`, for a padded step whose forward is in a CUDA graph or being recorded."""

    def begin(self) -> None:
        """Compute what the layers share on the device, where the step has been expanded."""

    def run(self, q_NHD: Tensor, pages: tuple[Tensor, Tensor], out_NHD: Tensor) -> None:
        """Attend to the cache of a layer; `out_NHD` is contiguous."""


def unsupported_decode_kernel(
    name: str, pool: KVPool, num_heads: int, capability: tuple[int, int]
) -> str | None:
    """Why the kernel of --decode-kernel cannot be used with this cache and GPU, or None."""
    group = num_heads // pool.num_kv_heads
    if name == "cuda_core" and group not in CUDA_CORE_GROUPS:
        return f"it does not support {group} query heads per key head"
    if name == "xqa":
        if capability[0] not in XQA_CAPABILITIES:
            return f"it does not support compute capability {capability[0]}.{capability[1]}"
        if pool.page_size not in XQA_PAGE_SIZES:
            return f"it does not support a --page-size of {pool.page_size}"
        if group > XQA_LARGEST_GROUP:
            return f"it does not support {group} query heads per key head"
    return None


def make_decode_kernel(name: str, setting: FlashInferSetting) -> DecodeKernel:
    """The kernel of --decode-kernel."""
    if name == "xqa":
        return XqaDecodes(setting)
    on_cuda_cores = name == "cuda_core"
    plan_again = _plan_cuda_core_in_graph if on_cuda_cores else _plan_one_query_in_graph
    return PlannedDecodes(setting, tensor_cores=not on_cuda_cores, plan_again=plan_again)


class PlannedDecodes:
    """By FlashInfer's decode wrapper, FA2 with `tensor_cores` and otherwise CUDA-core decode.

    A graph needs one wrapper per size; they run one at a time and share their memory.
    plan_again: plans a step for a wrapper whose own `plan` has been called before.
    """

    def __init__(
        self,
        setting: FlashInferSetting,
        *,
        tensor_cores: bool,
        plan_again: Callable[[Any, FlashInferSetting, SentStep], None],
    ) -> None:
        self._setting, self._tensor_cores, self._plan_again = setting, tensor_cores, plan_again
        self._wrapper = self._eager = setting.library.BatchDecodeWithPagedKVCacheWrapper(
            setting.workspace, "NHD", use_tensor_cores=tensor_cores, backend="fa2"
        )
        self._ring = PinnedRing(self._eager)
        self._graphs: dict[int, Any] = {}
        self._tensors: StepTensors | None = None

    def read_from(self, tensors: StepTensors) -> None:
        self._tensors = tensors

    def plan(self, step: SentStep) -> None:
        self._wrapper = self._eager
        self._plan(step)

    def plan_for_graph(self, step: SentStep) -> None:
        """The plan is that of the function behind the wrapper's `plan`, which writes the split of
        the work to where the graph reads it. The wrapper's own is called once per size, because it
        also sets the arguments that `run` passes to the kernel; the graph keeps those.
        """
        size = step.num_decodes
        found = self._graphs.get(size)
        if found is None:
            self._wrapper = self._graphs[size] = self._make_for_graph(size)
            # Without splits it takes none of the workspace.
            self._plan(step, disable_split_kv=True)
        else:
            self._wrapper = found
        with self._ring.lent_to(self._wrapper):
            self._plan_again(self._wrapper, self._setting, step)

    def begin(self) -> None:
        """The plan is all that the layers share."""

    def run(self, q_NHD: Tensor, pages: tuple[Tensor, Tensor], out_NHD: Tensor) -> None:
        self._wrapper.run(q_NHD, pages, out=out_NHD)

    def _plan(self, step: SentStep, **options: Any) -> None:
        assert self._tensors is not None
        n = step.num_decodes
        # A graph reads the page list in place; if it were passed, it would be copied onto itself.
        num_pages = step.num_decode_pages if self._wrapper is self._eager else 0
        with self._ring.lent_to(self._wrapper):
            self._wrapper.plan(
                step.host["page_starts"][: n + 1],
                self._tensors.pages[:num_pages],
                step.host["last_page_lens"][:n],
                *self._setting.heads,
                **self._setting.types,
                **options,
            )

    def _make_for_graph(self, size: int) -> Any:
        assert self._tensors is not None
        words = self._tensors.words
        wrapper = self._setting.library.BatchDecodeWithPagedKVCacheWrapper(
            self._setting.workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._tensor_cores,
            paged_kv_indptr_buffer=words["page_starts"][: size + 1],
            paged_kv_indices_buffer=self._tensors.pages,
            paged_kv_last_page_len_buffer=words["last_page_lens"][:size],
            backend="fa2",
        )
        wrapper._int_workspace_buffer = self._eager._int_workspace_buffer
        return wrapper


def _plan_one_query_in_graph(wrapper: Any, setting: FlashInferSetting, step: SentStep) -> None:
    """Unlike the wrapper's plan, this one states that all sequences have one query, so the graph
    gets a tile per sequence and not one for each way in which queries might be distributed.
    """
    n = step.num_decodes
    plan_fa2_in_graph(
        wrapper,
        setting.heads,
        torch.arange(n + 1, dtype=torch.int32),
        step.host["page_starts"][: n + 1],
        step.kv_lens[:n],
        num_queries=n,
        causal=False,  # not needed with one query
        uniform_q_len=1,
    )


def _plan_cuda_core_in_graph(wrapper: Any, setting: FlashInferSetting, step: SentStep) -> None:
    """The private function takes only positional arguments."""
    n = step.num_decodes
    num_heads, num_kv_heads, head_dim, page_size = setting.heads
    wrapper._plan_info = wrapper._cached_module.plan(
        wrapper._float_workspace_buffer,
        wrapper._int_workspace_buffer,
        wrapper._pin_memory_int_workspace_buffer,
        step.host["page_starts"][: n + 1],  # indptr
        n,  # batch_size
        num_heads,  # num_qo_heads
        num_kv_heads,  # num_kv_heads
        page_size,  # page_size
        True,  # enable_cuda_graph
        -1,  # window_left: no window
        0.0,  # logits_soft_cap: none
        head_dim,  # head_dim_qk
        head_dim,  # head_dim_vo
        torch.empty(0, dtype=setting.types["q_data_type"]),  # empty_q_data
        torch.empty(0, dtype=setting.types["kv_data_type"]),  # empty_kv_data
    )


class XqaDecodes:
    """By FlashInfer's XQA, which splits long sequences and joins the parts in one launch.

    The parts are in the workspace that prompts use, which is larger than XQA needs.
    """

    def __init__(self, setting: FlashInferSetting) -> None:
        self._setting = setting
        self._num_decodes = 0
        self._tensors: StepTensors | None = None
        self._page_table = self._kv_lens = self._semaphores = torch.empty(0)

    def read_from(self, tensors: StepTensors) -> None:
        self._tensors = tensors
        table, num_kv_heads = tensors.page_table, self._setting.heads[1]
        num_rows = table.shape[0] - 1  # one is for padding
        self._page_table = table.new_zeros(num_rows, table.shape[1])
        self._kv_lens = table.new_zeros(num_rows)
        # Every launch leaves them at zero.
        self._semaphores = table.new_zeros(num_rows * num_kv_heads).view(torch.uint32)

    def plan(self, step: SentStep) -> None:
        self._num_decodes = step.num_decodes

    def plan_for_graph(self, step: SentStep) -> None:
        self._num_decodes = step.num_decodes

    def begin(self) -> None:
        assert self._tensors is not None
        n, words = self._num_decodes, self._tensors.words
        pages = self._page_table[:n]
        torch.index_select(self._tensors.page_table, 0, words["rows"][:n], out=pages)
        torch.add(words["start_positions"][:n], 1, out=self._kv_lens[:n])

    def run(self, q_NHD: Tensor, pages: tuple[Tensor, Tensor], out_NHD: Tensor) -> None:
        """Unlike the others, it reads the queries as contiguous ones, whatever their strides."""
        n, (_, num_kv_heads, _, page_size) = self._num_decodes, self._setting.heads
        self._setting.library.xqa(
            q_NHD.contiguous().unsqueeze(1),
            *pages,
            self._page_table[:n],
            self._kv_lens[:n].view(torch.uint32).unsqueeze(1),
            out_NHD.unsqueeze(1),
            self._setting.workspace,
            self._semaphores,
            num_kv_heads,
            page_size,
        )
