"""The FlashInfer backend without a GPU.

In the place of FlashInfer's wrappers stand ones that compute in torch what FlashInfer documents of
them, and bind each call to the signature of the real one. The result is held against our own
attention over the same cache.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from step_driver import sampling_columns

from minisrv.engine.attention.page_lists import page_lists
from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable
from minisrv.model_config import ModelConfig, RopeConfig

flashinfer = pytest.importorskip("flashinfer")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_LEN, NUM_ROWS = 10, 2, 64, 200, 12


def documented(real: type, plan: Any) -> type:
    """A class with the calls of a wrapper of FlashInfer, over its CSR tables, in torch."""

    class Wrapper:
        def __init__(self, *args: Any, **options: Any) -> None:
            inspect.signature(real).bind(*args, **options)
            self._pin_memory_int_workspace_buffer = torch.zeros(8, dtype=torch.uint8)
            self.buffers_planned_in: list[int] = []
            assert args[1] == "NHD"

        def plan(self, *args: Any, **options: Any) -> None:
            names = inspect.signature(plan).bind(self, *args, **options).arguments
            self.buffers_planned_in.append(self._pin_memory_int_workspace_buffer.data_ptr())
            self.starts = names.get("indptr", names.get("paged_kv_indptr"))
            self.pages = names.get("indices", names.get("paged_kv_indices"))
            self.last = names.get("last_page_len", names.get("paged_kv_last_page_len"))
            for table in (self.starts, self.pages, self.last):
                assert table.dtype == torch.int32
            self.page_size = names["page_size"]
            size = len(self.last)
            self.query_starts = names.get("qo_indptr", torch.arange(size + 1, dtype=torch.int32))
            self.causal = names.get("causal", False)
            shape = (names["num_qo_heads"], names["num_kv_heads"])
            assert shape == (NUM_HEADS, NUM_KV_HEADS)
            head_dim = names.get("head_dim", names.get("head_dim_qk"))
            assert head_dim == HEAD_DIM
            assert names["q_data_type"] == torch.float32
            self.kv_dtype = names["kv_data_type"]

        def run(self, *args: Any, **options: Any) -> torch.Tensor:
            names = inspect.signature(real.run).bind(self, *args, **options).arguments  # type: ignore[attr-defined]
            q, (keys, values), out = names["q"], names["paged_kv_cache"], names["out"]
            assert out.is_contiguous()
            assert q.dtype == out.dtype == torch.float32
            assert keys.dtype == values.dtype == self.kv_dtype
            assert len(q) == self.query_starts[-1]
            for i, last in enumerate(self.last.tolist()):
                pages = self.pages[self.starts[i] : self.starts[i + 1]].long()
                kv_len = (len(pages) - 1) * self.page_size + last
                k, v = (
                    x[pages].flatten(0, 1)[:kv_len].transpose(0, 1).to(q.dtype)
                    for x in (keys, values)
                )
                part = slice(self.query_starts[i], self.query_starts[i + 1])
                count = int(part.stop - part.start)
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


@pytest.fixture
def backend_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    from minisrv.engine.attention.flashinfer import FlashInferAttention

    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    # The decode wrapper's `plan` hands its keywords on to this one.
    decode_plan = getattr(decode, "_plan_impl", decode.plan)
    monkeypatch.setattr(flashinfer, decode.__name__, documented(decode, decode_plan))
    monkeypatch.setattr(flashinfer, prefill.__name__, documented(prefill, prefill.plan))
    return FlashInferAttention


def make_pool(page_size: int, stored_dtype: torch.dtype = torch.float32) -> KVPool:
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=10,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position=MAX_LEN,
        max_seq_len=MAX_LEN,
        norm_eps=1e-6,
        rope=RopeConfig(),
    )
    device = torch.device("cpu")
    pool = KVPool(config, NUM_KV_HEADS, page_size, torch.float32, device, stored_dtype)
    pool.allocate(NUM_ROWS * -(-MAX_LEN // page_size))
    for cache in (tensor for pair in pool.pages for tensor in pair):
        cache.copy_(torch.randn(cache.shape))
    return pool


def random_batch(rng: np.random.Generator) -> ForwardBatch:
    """Decodes, then chunks; either may be missing, and a chunk may be one token."""
    num_decodes, num_prefills = rng.integers(0, 5, 2)
    num_prefills += num_decodes + num_prefills == 0
    size = int(num_decodes + num_prefills)
    query_lens = np.ones(size, np.int32)
    query_lens[num_decodes:] = rng.integers(1, 60, num_prefills)
    starts = rng.integers(0, MAX_LEN - 60, size).astype(np.int32)
    starts[rng.random(size) < 0.3] = 0
    none = np.empty(0, np.int32)
    return ForwardBatch(
        step_id=1,
        num_decodes=int(num_decodes),
        rows=rng.permutation(NUM_ROWS)[:size].astype(np.int32),
        query_lens=query_lens,
        start_positions=starts,
        prefill_ids=np.zeros(query_lens[num_decodes:].sum(), np.int32),
        page_rows=none,
        page_columns=none,
        page_ids=none,
        sample_indices=none,
        sampling=sampling_columns(0),
    )


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("seed", range(12))
def test_it_attends_as_torch_does(
    backend_class: Any, page_size: int, seed: int, stored_dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pool = make_pool(page_size, stored_dtype)
    table = PageTable(NUM_ROWS, MAX_LEN, page_size)
    table.pages[:] = rng.permutation(pool.num_pages).reshape(table.pages.shape)
    ours, reference = backend_class(pool, NUM_HEADS), TorchNativeAttention(pool)
    for _ in range(4):
        batch = random_batch(rng)
        ours.plan(batch, table)
        reference.plan(batch, table)
        num_tokens = int(batch.query_lens.sum())
        for layer_id in range(2):
            qkv = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
            parts = qkv.split_with_sizes([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
            slots = ours.cache_slots(layer_id)
            assert torch.equal(slots.slots_T, reference.cache_slots(layer_id).slots_T)
            straight = torch.ones(num_tokens, 1, HEAD_DIM), torch.zeros(num_tokens, 1, HEAD_DIM)
            TorchKernels().norm_rotate_store_(qkv, NUM_HEADS, None, straight, slots)
            torch.testing.assert_close(
                ours.forward(*parts, layer_id), reference.forward(*parts, layer_id)
            )


def test_plans_in_flight_are_written_to_buffers_of_their_own(backend_class: Any) -> None:
    pool = make_pool(16)
    table = PageTable(NUM_ROWS, MAX_LEN, 16)
    attention = backend_class(pool, NUM_HEADS)
    rng = np.random.default_rng(3)
    for _ in range(30):
        attention.plan(random_batch(rng), table)
    for wrapper in (attention._decode, attention._prefill):
        used = wrapper.buffers_planned_in
        assert len(used) > 6
        assert all(len(set(used[i : i + 3])) == 3 for i in range(len(used) - 2))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_page_lists_name_every_page_of_every_sequence(page_size: int) -> None:
    rng = np.random.default_rng(page_size)
    table = PageTable(20, 100, page_size)
    table.pages[:] = rng.integers(0, 1000, table.pages.shape)
    rows = rng.permutation(20)[:7].astype(np.int32)
    kv_lens = np.array([1, page_size, page_size + 1, 99, 100, 50, 3], np.int32)
    lists = page_lists(rows, kv_lens, table)
    for i, (row, kv_len) in enumerate(zip(rows, kv_lens, strict=True)):
        pages = lists.pages[lists.starts[i] : lists.starts[i + 1]]
        assert pages.tolist() == table.pages[row, : -(-kv_len // page_size)].tolist()
        assert (len(pages) - 1) * page_size + lists.last_page_lens[i] == kv_len
        assert 1 <= lists.last_page_lens[i] <= page_size
    assert {a.dtype for a in (lists.starts, lists.pages, lists.last_page_lens)} == {
        np.dtype(np.int32)
    }


def test_the_operators_are_called_as_flashinfer_declares_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minisrv.engine.kernels.cuda import CudaKernels

    real = {n: getattr(flashinfer, n) for n in ("rmsnorm", "fused_add_rmsnorm", "silu_and_mul")}
    reference = TorchKernels()

    def rmsnorm(*args: Any, **options: Any) -> torch.Tensor:
        names = inspect.signature(real["rmsnorm"]).bind(*args, **options).arguments
        return reference.add_rms_norm_(names["input"], None, names["weight"], names["eps"])

    def fused_add_rmsnorm(*args: Any, **options: Any) -> None:
        """As documented: residual += input, then input = norm(residual) * weight."""
        names = inspect.signature(real["fused_add_rmsnorm"]).bind(*args, **options).arguments
        names["residual"] += names["input"]
        normed = reference.add_rms_norm_(names["residual"], None, names["weight"], names["eps"])
        names["input"].copy_(normed)

    def silu_and_mul(*args: Any, **options: Any) -> torch.Tensor:
        names = inspect.signature(real["silu_and_mul"]).bind(*args, **options).arguments
        return reference.silu_and_mul(names["input"])

    for function in (rmsnorm, fused_add_rmsnorm, silu_and_mul):
        monkeypatch.setattr(flashinfer, function.__name__, function)
    kernels = CudaKernels()
    x, delta, weight = torch.randn(3, 32), torch.randn(3, 32), torch.rand(32)
    for given in (None, delta):
        ours, theirs = x.clone(), x.clone()
        copy = None if given is None else given.clone()
        normed = kernels.add_rms_norm_(ours, copy, weight, 1e-5)
        torch.testing.assert_close(normed, reference.add_rms_norm_(theirs, given, weight, 1e-5))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(kernels.silu_and_mul(x), reference.silu_and_mul(x))
