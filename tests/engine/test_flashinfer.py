"""The FlashInfer backend without a GPU.

In the place of FlashInfer's wrappers stand ones that compute in torch what FlashInfer documents of
them, and bind each call to the signature of the real one. The result is held against our own
attention over the same cache.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minisrv.checkpoint.model_config import ModelConfig, RopeConfig
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.attention.workspace import workspace_bytes
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.graph_shapes import GraphShape
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable
from minisrv.engine.step_buffer import StepBuffer, StepLimits, StepTensors
from minisrv.errors import EngineDeadError
from tests.support.device_parts import expand, patch_flashinfer
from tests.support.flashinfer_planner import NUM_SMS
from tests.support.step_driver import sampling_columns

flashinfer = pytest.importorskip("flashinfer")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_LEN, NUM_ROWS = 12, 2, 64, 200, 12
CHUNK_TOKENS = 150, 250  # of a graph; a chunk that is all padding has at most MAX_LEN


@pytest.fixture(autouse=True)
def _documented_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_flashinfer(monkeypatch)


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
    pool.allocate(NUM_ROWS * -(-MAX_LEN // page_size), spare=1)
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


class Ours:
    """Our backend with the tables, the words and the buffer that its steps come from."""

    def __init__(
        self,
        pool: KVPool,
        table: PageTable,
        num_bytes: int | None = None,
        decode_kernel: str = "auto",
    ) -> None:
        self.limits = StepLimits(NUM_ROWS, 500, MAX_LEN, pool.page_size)
        self.tensors = StepTensors(self.limits, torch.device("cpu"), spare_page=pool.num_pages)
        self.tensors.page_table[:NUM_ROWS] = torch.from_numpy(table.pages)
        self.buffer = StepBuffer(self.limits, self.tensors)
        enough = workspace_bytes(
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            num_sms=NUM_SMS,
            largest_graph=NUM_ROWS,
            chunk_tokens=CHUNK_TOKENS[-1],
        )
        self.attention = FlashInferAttention(pool, NUM_HEADS, num_bytes or enough, decode_kernel)
        self.attention.read_from(self.tensors)

    def plan(self, batch: ForwardBatch, shape: GraphShape | None = None) -> None:
        step = self.buffer.send(batch, shape)
        plan = self.attention.plan_for_graph if shape else self.attention.plan
        plan(step)
        expand(self.tensors, self.limits, step.num_decodes + step.num_prefills)
        self.attention.begin()
        self.buffer.mark_launched()


def random_shape(rng: np.random.Generator, batch: ForwardBatch) -> GraphShape | None:
    """One that a batch may be padded to."""
    n, num_tokens = batch.num_decodes, batch.prefill_ids.size
    if rng.random() < 0.2:
        return None
    if not num_tokens:
        return GraphShape(int(rng.integers(n, NUM_ROWS + 1)))
    most = next(most for most in CHUNK_TOKENS if num_tokens <= most)
    return GraphShape(int(rng.choice([n, 4])), most)


def make_table(pool: KVPool, rng: np.random.Generator) -> PageTable:
    table = PageTable(NUM_ROWS, MAX_LEN, pool.page_size)
    table.pages[:] = rng.permutation(pool.num_pages).reshape(table.pages.shape)
    return table


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(4, 12))]
)
def test_it_attends_as_torch_does(page_size: int, seed: int, stored_dtype: torch.dtype) -> None:
    hold_against_torch(page_size, seed, stored_dtype)


@pytest.mark.parametrize("decode_kernel", ["fa2", "cuda_core", "xqa"])
@pytest.mark.parametrize("seed", range(4))
def test_each_decode_kernel_attends_as_torch_does(seed: int, decode_kernel: str) -> None:
    hold_against_torch(16, seed, torch.float32, decode_kernel)


def hold_against_torch(
    page_size: int, seed: int, stored_dtype: torch.dtype, decode_kernel: str = "auto"
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pool = make_pool(page_size, stored_dtype)
    table = make_table(pool, rng)
    ours = Ours(pool, table, decode_kernel=decode_kernel)
    reference = TorchNativeAttention(pool)
    for _ in range(4):
        batch = random_batch(rng)
        shape = random_shape(rng, batch)
        ours.plan(batch, shape)
        reference.plan(batch, table)
        places, size = places_of_tokens(batch, shape)
        others = sorted(set(range(size)) - set(places))
        for layer_id in range(2):
            qkv = torch.randn(size, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
            parts = qkv.split_with_sizes([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
            slots = ours.attention.cache_slots(layer_id)
            expected_slots = reference.cache_slots(layer_id).slots_T
            assert torch.equal(slots.slots_T[places], expected_slots)
            assert (slots.slots_T[others] // page_size == pool.num_pages).all()
            straight = torch.ones(len(qkv), 1, HEAD_DIM), torch.zeros(len(qkv), 1, HEAD_DIM)
            TorchKernels().norm_rotate_store_(qkv, NUM_HEADS, None, straight, slots)
            real = [part[places] for part in parts]
            torch.testing.assert_close(
                ours.attention.forward(*parts, layer_id)[places],
                reference.forward(*real, layer_id),
            )


def places_of_tokens(batch: ForwardBatch, shape: GraphShape | None) -> tuple[list[int], int]:
    """Where the tokens of a step are, and how many there are with the padding."""
    n, num_tokens = batch.num_decodes, batch.prefill_ids.size
    if shape is None:
        return list(range(n + num_tokens)), n + num_tokens
    first = shape.num_decodes
    return [*range(n), *range(first, first + num_tokens)], shape.num_tokens


def test_plans_in_flight_are_written_to_buffers_of_their_own() -> None:
    pool = make_pool(16)
    rng = np.random.default_rng(3)
    ours = Ours(pool, make_table(pool, rng))
    attention = ours.attention
    used: dict[int, list[int]] = {}
    for _ in range(60):
        batch = random_batch(rng)
        ours.plan(batch, random_shape(rng, batch))
        for ring, wrapper in (
            (attention._decode._ring, attention._decode._wrapper),  # type: ignore[attr-defined]
            (attention._prefill_ring, attention._prefill),
        ):
            used.setdefault(id(ring), []).extend(wrapper.buffers_planned_in)
            wrapper.buffers_planned_in.clear()
    for buffers in used.values():
        assert len(buffers) > 6
        assert all(len(set(buffers[i : i + 3])) == 3 for i in range(len(buffers) - 2))


@pytest.mark.parametrize(
    ("shape", "option"),
    [(None, "--attention-backend torch_native"), (GraphShape(4), "--cuda-graph-max-bs")],
)
def test_a_plan_that_fails_names_the_option_to_change(
    shape: GraphShape | None, option: str
) -> None:
    pool = make_pool(16)
    ours = Ours(pool, make_table(pool, np.random.default_rng(0)), num_bytes=16)
    one = np.ones(1, np.int32)
    long_decode = replace(
        random_batch(np.random.default_rng(0)),
        num_decodes=1,
        rows=one,
        query_lens=one,
        start_positions=190 * one,
        prefill_ids=one[:0],
    )
    pattern = f"FlashInfer cannot plan .*: Buffer overflow .*; use .*{option}"
    with pytest.raises(EngineDeadError, match=pattern):
        ours.plan(long_decode, shape)


def arguments_of_plan(plan: Any) -> list[str]:
    """What a wrapper's `plan` hands to the function behind it, as in FlashInfer's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(plan))))
    lists = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "args"
    ]
    assert len(lists) == 1
    assert isinstance(lists[0], ast.List)
    given = [ast.unparse(entry) for entry in lists[0].elts]
    given += [
        ast.unparse(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "args.append"
    ]
    return given


def test_decodes_in_graphs_are_planned_by_the_call_that_flashinfer_itself_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its arguments, in the order in which FlashInfer's source has them."""
    monkeypatch.undo()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    assert arguments_of_plan(getattr(wrapper, "_plan_impl", wrapper.plan)) == [
        "self._float_workspace_buffer",
        "self._int_workspace_buffer",
        "self._pin_memory_int_workspace_buffer",
        "qo_indptr_host",
        "indptr_host",
        "kv_lens_arr_host",
        "batch_size * q_len_per_req",
        "batch_size",
        "num_qo_heads",
        "num_kv_heads",
        "page_size",
        "self.is_cuda_graph_enabled",
        "head_dim",
        "head_dim",
        "is_causal",
        "window_left",
        "fixed_split_size",
        "disable_split_kv",
        "0",
        "q_len_per_req if q_len_per_req > 1 else 0",
    ]


def test_decodes_on_cuda_cores_in_graphs_are_planned_by_the_call_that_flashinfer_itself_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    source = inspect.getsource(inspect.unwrap(getattr(wrapper, "_plan_impl", wrapper.plan)))
    calls = [
        [ast.unparse(argument) for argument in node.args]
        for node in ast.walk(ast.parse(textwrap.dedent(source)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self._cached_module.plan"
    ]
    assert [
        "self._float_workspace_buffer",
        "self._int_workspace_buffer",
        "self._pin_memory_int_workspace_buffer",
        "indptr_host",
        "batch_size",
        "num_qo_heads",
        "num_kv_heads",
        "page_size",
        "self.is_cuda_graph_enabled",
        "window_left",
        "logits_soft_cap",
        "head_dim",
        "head_dim",
        "torch.empty(0, dtype=q_data_type)",
        "torch.empty(0, dtype=kv_data_type)",
    ] in calls


def test_chunks_in_graphs_are_planned_by_the_call_that_flashinfer_itself_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert arguments_of_plan(flashinfer.BatchPrefillWithPagedKVCacheWrapper.plan) == [
        "self._float_workspace_buffer",
        "self._int_workspace_buffer",
        "self._pin_memory_int_workspace_buffer",
        "qo_indptr_host",
        "paged_kv_indptr_host",
        "kv_lens_arr_host",
        "self._max_total_num_rows or total_num_rows",
        "batch_size",
        "num_qo_heads",
        "num_kv_heads",
        "page_size",
        "self.is_cuda_graph_enabled",
        "head_dim_qk",
        "head_dim_vo",
        "causal",
        "window_left",
        "fixed_split_size or -1",
        "disable_split_kv",
        "0",
        "0",
    ]


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
    kernels = CudaKernels(joined=False)
    x, delta, weight = torch.randn(3, 32), torch.randn(3, 32), torch.rand(32)
    for given in (None, delta):
        ours, theirs = x.clone(), x.clone()
        copy = None if given is None else given.clone()
        normed = kernels.add_rms_norm_(ours, copy, weight, 1e-5)
        torch.testing.assert_close(normed, reference.add_rms_norm_(theirs, given, weight, 1e-5))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(kernels.silu_and_mul(x), reference.silu_and_mul(x))
