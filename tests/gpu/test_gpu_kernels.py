"""Each kernel of a GPU against the same in float64 on the same 16-bit inputs."""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size, N cache slots.

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from minisrv.checkpoint.model_config import ModelConfig, RopeConfig
from minisrv.config import ServerConfig
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.backends import choose_backends, device_kernels
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.base import CacheSlots, Kernels, QKNormWeights
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable
from minisrv.engine.step_buffer import StepBuffer, StepLimits, StepTensors
from tests.support.step_driver import sampling_columns

DEVICE = torch.device("cuda")
NUM_KV_HEADS, MAX_LEN, NUM_ROWS = 2, 1200, 16
# (decodes, prompt chunks, whether the chunks continue what is cached)
STEPS = {
    "decode": (9, 0, False),
    "prefill": (0, 4, False),
    "extend": (0, 4, True),
    "mixed": (5, 3, True),
    "graph": (9, 0, False),
}
REFERENCE = TorchKernels()


def make_pool(page_size: int, head_dim: int, num_heads: int) -> KVPool:
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=10,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        max_position=MAX_LEN,
        max_seq_len=MAX_LEN,
        norm_eps=1e-6,
        rope=RopeConfig(),
    )
    pool = KVPool(config, NUM_KV_HEADS, page_size, torch.bfloat16, DEVICE)
    pool.allocate(NUM_ROWS * -(-MAX_LEN // page_size), spare=1)
    for keys, values in pool.pages:
        keys.normal_()
        values.normal_()
    return pool


def backends(pool: KVPool, num_heads: int) -> tuple[Kernels, FlashInferAttention]:
    kernels, attention = choose_backends(ServerConfig(), pool, num_heads)
    names = (type(kernels).__name__, type(attention).__name__)
    assert names == ("CudaKernels", "FlashInferAttention")
    assert isinstance(attention, FlashInferAttention)
    return kernels, attention


def make_batch(kind: str, rng: np.random.Generator) -> ForwardBatch:
    num_decodes, num_chunks, continued = STEPS[kind]
    size = num_decodes + num_chunks
    query_lens = np.ones(size, np.int32)
    query_lens[num_decodes:] = rng.integers(1, 300, num_chunks)
    starts = rng.integers(0, MAX_LEN - 300, size).astype(np.int32)
    if not continued:
        starts[num_decodes:] = 0
    none = np.empty(0, np.int32)
    return ForwardBatch(
        step_id=1,
        num_decodes=num_decodes,
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


def attend(batch: ForwardBatch, table: PageTable, pool: KVPool, q_THD: Tensor) -> Tensor:
    """Causal attention of each sequence over what its pages hold, in float64."""
    keys, values = pool.pages[1]
    outputs, first = [], 0
    for row, start, count in zip(batch.rows, batch.start_positions, batch.query_lens, strict=True):
        kv_len = int(start + count)
        pages = torch.from_numpy(table.pages[row, : -(-kv_len // table.page_size)].astype(np.int64))
        k, v = (x[pages.to(DEVICE)].flatten(0, 1)[:kv_len].double() for x in (keys, values))
        q = q_THD[first : first + int(count)].double()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thd,nhd->htn", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=DEVICE).triu(int(start) + 1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("htn,nhd->thd", probs, v))
        first += int(count)
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_attention(page_size: int, group: int, head_dim: int, kind: str) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(page_size * group)
    num_heads = group * NUM_KV_HEADS
    pool = make_pool(page_size, head_dim, num_heads)
    _, attention = backends(pool, num_heads)
    table = PageTable(NUM_ROWS, MAX_LEN, page_size)
    table.pages[:] = rng.permutation(pool.num_pages).reshape(table.pages.shape)
    limits = StepLimits(NUM_ROWS, 1200, MAX_LEN, page_size)
    tensors = StepTensors(limits, DEVICE, spare_page=pool.num_pages)
    tensors.page_table[:NUM_ROWS] = torch.from_numpy(table.pages)
    buffer, expand = StepBuffer(limits, tensors), device_kernels().expand
    attention.read_from(tensors)
    for _ in range(3):
        batch = make_batch(kind, rng)
        step = buffer.send(batch)
        plan = attention.plan_for_graph if kind == "graph" else attention.plan
        plan(step)
        expand(tensors, limits, step.num_decodes + step.num_prefills)
        num_tokens = int(batch.query_lens.sum())
        heads = (num_heads, NUM_KV_HEADS, NUM_KV_HEADS)
        qkv = torch.randn(num_tokens, sum(heads), head_dim, dtype=torch.bfloat16, device=DEVICE)
        q_THD, k_TKD, v_TKD = qkv.split_with_sizes(heads, 1)
        slots = attention.cache_slots(1)
        slots.keys_NKD.index_copy_(0, slots.slots_T, k_TKD)
        slots.values_NKD.index_copy_(0, slots.slots_T, v_TKD)
        ours = attention.forward(q_THD, k_TKD, v_TKD, 1)
        buffer.mark_launched()
        expected = attend(batch, table, pool, q_THD)
        torch.testing.assert_close(ours.double(), expected, rtol=1.6e-2, atol=1.6e-2)


@pytest.fixture
def kernels() -> Kernels:
    torch.manual_seed(0)
    return backends(make_pool(16, 64, 4), 4)[0]


def half(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("shape", [(1, 1024), (256, 4096), (3000, 5120)])
def test_norm(kernels: Kernels, shape: tuple[int, int], with_delta: bool) -> None:
    x, weight = half(*shape), half(shape[1])
    delta = half(*shape) if with_delta else None
    reference = x.double()
    expected = REFERENCE.add_rms_norm_(
        reference, None if delta is None else delta.double(), weight.double(), 1e-6
    )
    assert_close(kernels.add_rms_norm_(x, delta, weight, 1e-6), expected)
    assert_close(x, reference)


@pytest.mark.parametrize("shape", [(1, 6144), (256, 24576), (3000, 34816)])
def test_silu(kernels: Kernels, shape: tuple[int, int]) -> None:
    gate_up = half(*shape) * 4
    assert_close(kernels.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up.double()))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("num_heads", [2, 10, 32])
def test_norm_rotate_store(
    kernels: Kernels, num_heads: int, head_dim: int, with_norm: bool
) -> None:
    num_tokens, num_slots = 77, 500
    qkv, rope = half(num_tokens, num_heads + 4, head_dim), half(2, num_tokens, 1, head_dim)
    weights = half(2, head_dim)
    slots = torch.randperm(num_slots, device=DEVICE)[:num_tokens]
    results = []
    for function, dtype in (
        (kernels.norm_rotate_store_, torch.bfloat16),
        (REFERENCE.norm_rotate_store_, torch.float64),
    ):
        q_D, k_D = weights.to(dtype)
        given = qkv.to(dtype, copy=True)
        keys = torch.zeros(num_slots, 2, head_dim, dtype=dtype, device=DEVICE)
        cache = CacheSlots(slots, keys, torch.zeros_like(keys))
        norm = QKNormWeights(q_D, k_D, 1e-6) if with_norm else None
        cos, sin = rope.to(dtype)
        function(given, num_heads, norm, (cos, sin), cache)
        results.append((given, cache.keys_NKD, cache.values_NKD))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)
