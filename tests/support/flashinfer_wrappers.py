"""In the place of FlashInfer's wrappers: what FlashInfer documents of them, in torch.

Each call is bound to the signature of the real one. In CUDA-graph mode a wrapper reads its tables
from the buffers that it was given, when it runs; its plan is made by the call that FlashInfer's own
`plan` makes in the end, after one call of that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.flashinfer_planner import NUM_SMS, Heads, float_bytes


def documented_xqa(real: Any) -> Any:
    """The function `xqa`, for one query per sequence.

    It computes in the dtype of the cache: with FP8, queries and softmax are rounded to it. Lengths
    and tables are read when it runs. Semaphores must be zero.
    """

    def xqa(*args: Any, **options: Any) -> None:
        names = inspect.signature(real).bind(*args, **options).arguments
        q, out, table = names["q"], names["output"], names["page_table"]
        keys, values, page_size = names["k_cache"], names["v_cache"], names["page_size"]
        kv_lens = names["seq_lens"].view(torch.int32).flatten().tolist()
        size, beams, num_heads, head_dim = q.shape
        assert beams == 1
        assert out.shape == q.shape
        assert names["seq_lens"].dtype == names["semaphores"].dtype == torch.uint32
        assert names["seq_lens"].shape == (size, 1)
        assert table.dtype == torch.int32
        assert all(x.is_contiguous() for x in (q, out, table, names["seq_lens"]))
        assert keys.shape[1:] == (page_size, names["num_kv_heads"], head_dim)
        assert not names["semaphores"].view(torch.int32).any()
        assert len(names["semaphores"]) >= size * names["num_kv_heads"]

        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.to(keys.dtype).float() if keys.dtype == torch.float8_e4m3fn else x.float()

        group = num_heads // names["num_kv_heads"]
        for i, kv_len in enumerate(kv_lens):
            assert 1 <= kv_len <= table.shape[1] * page_size
            pages = table[i, : -(-kv_len // page_size)].long()
            k, v = (
                x[pages].flatten(0, 1)[:kv_len].float().repeat_interleave(group, 1)
                for x in (keys, values)
            )
            scores = torch.einsum("hd,nhd->hn", rounded(q[i, 0]), k) / head_dim**0.5
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            sums = weights.sum(1, keepdim=True)
            out[i, 0] = torch.einsum("hn,nhd->hd", rounded(weights), v) / sums

    return xqa


def documented(real: type, plan: Any) -> type:
    """A class with the calls of a wrapper, over its CSR tables."""

    class Wrapper:
        def __init__(self, *args: Any, **options: Any) -> None:
            names = inspect.signature(real).bind(*args, **options).arguments
            assert names["kv_layout"] == "NHD"
            assert not names["float_workspace_buffer"].any()
            self._float_workspace_buffer = names["float_workspace_buffer"]
            self._int_workspace_buffer = torch.zeros(8, dtype=torch.uint8)
            self._pin_memory_int_workspace_buffer = torch.zeros(8, dtype=torch.uint8)
            self.in_graph = names.get("use_cuda_graph", False)
            self.fixed = [
                names[name + ending]
                for name in ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
                for ending in ("_buf", "_buffer")
                if name + ending in names
            ]
            assert len(self.fixed) == (3 if self.in_graph else 0)
            self.fixed_queries = names.get("qo_indptr_buf")
            self.buffers_planned_in: list[int] = []
            on_cuda_cores = names.get("use_tensor_cores") is False
            self._cached_module = _CudaCoreModule(self) if on_cuda_cores else _Module(self)

        def plan(self, *args: Any, **options: Any) -> None:
            names = inspect.signature(plan).bind(self, *args, **options).arguments
            self.buffers_planned_in.append(self._pin_memory_int_workspace_buffer.data_ptr())
            starts = names.get("indptr", names.get("paged_kv_indptr"))
            pages = names.get("indices", names.get("paged_kv_indices"))
            last = names.get("last_page_len", names.get("paged_kv_last_page_len"))
            for table in (starts, pages, last):
                assert table.dtype == torch.int32
            size = len(last)
            self.page_size, self.causal = names["page_size"], names.get("causal", False)
            self.query_starts = names.get("qo_indptr", torch.arange(size + 1, dtype=torch.int32))
            head_dim = names.get("head_dim", names.get("head_dim_qk"))
            self.heads = (names["num_qo_heads"], names["num_kv_heads"], head_dim)
            self.q_dtype, self.kv_dtype = names["q_data_type"], names["kv_data_type"]
            self.num_queries = int(self.query_starts[-1])
            if not self.in_graph:
                kv_lens = (starts.diff() - 1).clamp(0) * self.page_size + last
                self._cached_module.check_workspace(self.query_starts.diff(), kv_lens)
                self.tables = (starts.clone(), pages, last.clone())
                return
            assert len(last) == len(self.fixed[2])
            assert len(starts) == len(self.fixed[0])
            if self.fixed_queries is not None:
                assert len(self.query_starts) == len(self.fixed_queries)
                self.fixed_queries.copy_(self.query_starts)
                self.query_starts = self.fixed_queries
            self.fixed[0].copy_(starts)
            self.fixed[1][: len(pages)].copy_(pages)
            self.fixed[2].copy_(last)
            self.tables = tuple(self.fixed)
            assert names["disable_split_kv"]

        def run(self, *args: Any, **options: Any) -> torch.Tensor:
            names = inspect.signature(real.run).bind(self, *args, **options).arguments  # type: ignore[attr-defined]
            q, (keys, values), out = names["q"], names["paged_kv_cache"], names["out"]
            assert out.is_contiguous()
            assert q.dtype == out.dtype == self.q_dtype
            assert keys.dtype == values.dtype == self.kv_dtype
            assert (q.shape[1], *keys.shape[2:]) == self.heads
            assert len(q) == self.query_starts[-1]
            starts, all_pages, lasts = self.tables
            for i, last in enumerate(lasts.tolist()):
                pages = all_pages[starts[i] : starts[i + 1]].long()
                kv_len = max(len(pages) - 1, 0) * self.page_size + last
                if self.in_graph:
                    self._cached_module.check_planned(i, len(pages), kv_len)
                k, v = (
                    x[pages].flatten(0, 1)[:kv_len].transpose(0, 1).to(q.dtype)
                    for x in (keys, values)
                )
                part = slice(self.query_starts[i], self.query_starts[i + 1])
                count = int(part.stop - part.start)
                if not count:
                    continue
                # Aligned at the end: the last query sees everything.
                mask = torch.ones(count, kv_len, dtype=torch.bool).tril(kv_len - count)
                out[part] = F.scaled_dot_product_attention(
                    q[part].transpose(0, 1),
                    k,
                    v,
                    attn_mask=mask if self.causal else None,
                    enable_gqa=True,
                ).transpose(0, 1)
            return out  # type: ignore[no-any-return]

    return Wrapper


class _Module:
    """The compiled module of a wrapper: `plan` takes what FlashInfer's own `plan` hands to it."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def check_workspace(self, query_lens: torch.Tensor, kv_lens: torch.Tensor) -> None:
        """Raise as FlashInfer does, where the plan takes more than there is."""
        wrapper = self._wrapper
        size = float_bytes(
            Heads(*wrapper.heads, wrapper.page_size),
            query_lens.numpy(),
            kv_lens.numpy(),
            num_sms=NUM_SMS,
            in_graph=wrapper.in_graph,
            uniform=wrapper.fixed_queries is None,
        )
        if size > wrapper._float_workspace_buffer.numel():
            raise RuntimeError(f"Buffer overflow when allocating memory with size {size}")

    def plan(
        self,
        float_workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        pinned_int_workspace: torch.Tensor,
        query_starts: torch.Tensor,
        page_starts: torch.Tensor,
        kv_lens: torch.Tensor,
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
    ) -> list[int]:
        wrapper = self._wrapper
        assert in_graph
        assert wrapper.in_graph
        assert int_workspace is wrapper._int_workspace_buffer
        assert (num_heads, num_kv_heads, head_dim_qk) == wrapper.heads
        assert (head_dim_vo, page_size) == (head_dim_qk, wrapper.page_size)
        uniform = wrapper.fixed_queries is None
        assert (causal, window_left) == (wrapper.causal, -1)
        assert (fixed_split_size, disable_split_kv) == (-1, False)
        assert (num_colocated_ctas, uniform_q_len) == (0, int(uniform))
        assert batch_size == len(kv_lens) == len(wrapper.fixed[2])
        if uniform:
            assert query_starts.tolist() == list(range(batch_size + 1))
        assert num_rows == query_starts[-1] == wrapper.num_queries
        assert query_starts.dtype == page_starts.dtype == kv_lens.dtype == torch.int32
        assert page_starts.diff().tolist() == (-(-kv_lens // page_size)).tolist()
        self.check_workspace(query_starts.diff(), kv_lens)
        wrapper.buffers_planned_in.append(pinned_int_workspace.data_ptr())
        self._planned_lens = kv_lens.clone()
        return []

    def check_planned(self, index: int, num_pages: int, kv_len: int) -> None:
        """The plan in the workspace is for a sequence of this length."""
        assert kv_len == self._planned_lens[index]


class _CudaCoreModule:
    """The same of a wrapper that does not use tensor cores."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def check_workspace(self, query_lens: torch.Tensor, kv_lens: torch.Tensor) -> None:
        """It takes far less than FA2 does: tests/gpu_dry_run/test_planner.py."""

    def plan(
        self,
        float_workspace: torch.Tensor,
        int_workspace: torch.Tensor,
        pinned_int_workspace: torch.Tensor,
        page_starts: torch.Tensor,
        batch_size: int,
        num_heads: int,
        num_kv_heads: int,
        page_size: int,
        in_graph: bool,
        window_left: int,
        logits_soft_cap: float,
        head_dim_qk: int,
        head_dim_vo: int,
        empty_q: torch.Tensor,
        empty_kv: torch.Tensor,
    ) -> list[int]:
        wrapper = self._wrapper
        assert in_graph
        assert wrapper.in_graph
        assert int_workspace is wrapper._int_workspace_buffer
        assert (num_heads, num_kv_heads, head_dim_qk) == wrapper.heads
        assert (head_dim_vo, page_size) == (head_dim_qk, wrapper.page_size)
        assert (window_left, logits_soft_cap) == (-1, 0.0)
        assert batch_size == len(page_starts) - 1 == len(wrapper.fixed[2])
        assert (empty_q.dtype, empty_kv.dtype) == (wrapper.q_dtype, wrapper.kv_dtype)
        assert page_starts.dtype == torch.int32
        wrapper.buffers_planned_in.append(pinned_int_workspace.data_ptr())
        self._planned_pages = page_starts.diff().tolist()
        return []

    def check_planned(self, index: int, num_pages: int, kv_len: int) -> None:
        """The plan in the workspace is for a sequence of so many pages."""
        assert num_pages == self._planned_pages[index]
