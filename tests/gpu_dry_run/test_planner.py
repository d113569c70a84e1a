"""FlashInfer's planner on random mixes of lengths never takes more workspace than there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from minisrv.checkpoint.model_config import ModelConfig, RopeConfig
from minisrv.config import ServerConfig
from minisrv.engine.attention.decode_kernels import CUDA_CORE_GROUPS
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.backends import choose_backends
from minisrv.engine.graph_shapes import CHUNKS, mixed_shapes
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.model_size import graph_sizes
from tests.gpu_dry_run.dry_run import dry_run, machine
from tests.gpu_dry_run.fake_cuda import NUM_SMS
from tests.gpu_dry_run.models import MODELS
from tests.gpu_dry_run.planner import PlanError, Planner, Request, load_planner, make_request

PAGE_SIZE, MAX_LEN = 16, 40960
LARGEST_GRAPH = 256
CHUNK_GRAPHS = mixed_shapes(
    512, largest_graph=LARGEST_GRAPH, num_rows=256, max_chunk_tokens=MAX_LEN
)
MAX_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Heads:
    """The heads of a rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


HEADS = {
    "Qwen3-0.6B": Heads(16, 8),
    "Qwen3-8B": Heads(32, 8),
    "Qwen3-14B": Heads(40, 8),
    "Qwen3-32B": Heads(64, 8),
    "Qwen3-32B, one of 2 ranks": Heads(32, 4),
    "Qwen3-30B-A3B": Heads(32, 4),
    "Qwen3-30B-A3B, one of 4 ranks": Heads(8, 1),
    "Qwen2.5-0.5B": Heads(14, 2, 64),
    "Qwen2.5-7B": Heads(28, 4),
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Gemma-2-9B": Heads(16, 8, 256),
}
every_shape = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
_FOR_CUDA_CORES = {n: heads for n, heads in HEADS.items() if heads.group in CUDA_CORE_GROUPS}


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    return load_planner()


def workspace_bytes(heads: Heads) -> int:
    """The float workspace of the engine's own FlashInferAttention."""
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=1024,
        num_layers=1,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        max_position=MAX_LEN,
        max_seq_len=MAX_LEN,
        norm_eps=1e-6,
        rope=RopeConfig(),
    )
    with machine():
        device = torch.device("cuda", 0)
        pool = KVPool(config, heads.num_kv_heads, PAGE_SIZE, torch.bfloat16, device)
        options = ServerConfig(
            cuda_graph_max_bs=LARGEST_GRAPH, cuda_graph_max_tokens=512, device="cuda"
        )
        _, attention = choose_backends(options, pool, heads.num_heads)
        assert isinstance(attention, FlashInferAttention)
        return attention._setting.workspace.numel()


def request(heads: Heads, query_lens: np.ndarray, kv_lens: np.ndarray, **options: int) -> Request:
    return make_request(
        query_lens,
        kv_lens,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        page_size=PAGE_SIZE,
        **options,
    )


def random_chunks(heads: Heads, rng: np.random.Generator) -> Request:
    """The prefill chunks of a step."""
    size = int(rng.choice([1, 1, 2, 3, rng.integers(4, 60)]))
    most = int(rng.choice([20, 100, 600, 4096]))
    query_lens = rng.integers(1, max(2, min(most, MAX_PREFILL_TOKENS // size)), size)
    contexts = rng.integers(0, int(rng.choice([1, 500, 5000, MAX_LEN - 4096])), size)
    return request(heads, query_lens, query_lens + contexts)


def graph_request(heads: Heads, kv_lens: np.ndarray) -> Request:
    """Decodes in a graph, planned with the options of the engine."""
    ones = np.ones(len(kv_lens), int)
    return request(heads, ones, kv_lens, in_graph=True, uniform_q_len=uniform_q_len())


@cache
def uniform_q_len() -> int:
    """Of the plan that a served model has made for a graph."""
    model = MODELS["Qwen3-0.6B"]
    with (
        TemporaryDirectory() as folder,
        dry_run(model, Path(folder), num_layers=1, cuda_graph_max_bs=1) as run,
    ):
        held = [plan.request for plan in run.machine.plans.held.values()]
        (found,) = [planned for planned in held if planned.in_graph]
        return found.uniform_q_len


def random_kv_lens(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(1, int(rng.choice([2, 300, 3000, MAX_LEN])), size)


def random_decodes(heads: Heads, rng: np.random.Generator) -> Request:
    """More than fit into a graph, or of a rank that has no graphs."""
    size = int(rng.integers(1, 2 * LARGEST_GRAPH))
    return request(heads, np.ones(size, int), random_kv_lens(rng, size))


def random_graph(heads: Heads, rng: np.random.Generator) -> Request:
    return graph_request(heads, random_kv_lens(rng, int(rng.choice(graph_sizes(LARGEST_GRAPH)))))


def random_chunk_graph(
    heads: Heads, rng: np.random.Generator, num_tokens: int | None = None
) -> Request:
    """The chunks of a padded step in a graph, with empty ones among them."""
    total = num_tokens or int(rng.choice([shape.num_chunk_tokens for shape in CHUNK_GRAPHS]))
    count = int(rng.integers(1, CHUNKS + 1))
    ends = np.sort(rng.choice(np.arange(1, total), count - 1, replace=False))
    query_lens = np.zeros(CHUNKS, int)
    query_lens[:count] = np.diff([0, *ends, total])
    contexts = rng.integers(0, int(rng.choice([1, 500, 5000, MAX_LEN - 4096])), CHUNKS)
    kv_lens = query_lens + contexts * (query_lens > 0)
    return request(heads, query_lens, kv_lens, in_graph=True)


def random_registers(rng: np.random.Generator) -> int:
    """Of the kernel for CUDA cores: the fewer, the more sequences are split."""
    return int(rng.integers(24, 128))


def largest_chunk_graph(heads: Heads) -> Request:
    return random_chunk_graph(heads, np.random.default_rng(4), 512)


def largest_graph(heads: Heads) -> Request:
    return graph_request(heads, np.ones(LARGEST_GRAPH, int))


def largest_chunk(heads: Heads) -> Request:
    """One chunk that fills a tile, with as many splits of its context as the planner makes."""
    rows = 64 if heads.head_dim >= 256 else 128
    splits = 2 * NUM_SMS // heads.num_kv_heads
    length = max(1, rows // heads.group)
    return request(heads, np.array([length]), np.array([splits * 128]))


def plan_random_mixes(planner: Planner, heads: Heads, count: int, seed: int) -> None:
    """As many of each kind, with the engine's workspace. Raises PlanError if one overflows."""
    rng, available = np.random.default_rng(seed), workspace_bytes(heads)
    for _ in range(count):
        planner.plan(random_chunks(heads, rng), available)
        planner.plan(random_decodes(heads, rng), available)
        planner.plan(random_graph(heads, rng), available)
        planner.plan(random_chunk_graph(heads, rng), available)
        if heads.group in CUDA_CORE_GROUPS:
            for decodes in (random_decodes(heads, rng), random_graph(heads, rng)):
                planner.plan_decode(decodes, available, registers=random_registers(rng))


@every_shape
def test_random_mixes_fit_into_the_workspace(planner: Planner, heads: Heads) -> None:
    plan_random_mixes(planner, heads, 100, seed=0)


@pytest.mark.soak
@every_shape
def test_ten_thousand_mixes_fit_into_the_workspace(planner: Planner, heads: Heads) -> None:
    plan_random_mixes(planner, heads, 10_000, seed=1)


@every_shape
def test_the_plans_that_take_most_fit_into_the_workspace(planner: Planner, heads: Heads) -> None:
    available = workspace_bytes(heads)
    planner.plan(largest_chunk(heads), available)
    planner.plan(largest_graph(heads), available)
    planner.plan(largest_chunk_graph(heads), available)


@every_shape
def test_no_random_mix_takes_more_than_the_largest(planner: Planner, heads: Heads) -> None:
    """So the test above is the worst case, whatever the size of the workspace."""
    enough, rng = 2**33, np.random.default_rng(2)
    chunk = planner.plan(largest_chunk(heads), enough).float_bytes
    graph = planner.plan(largest_graph(heads), enough).float_bytes
    chunk_graph = planner.plan(largest_chunk_graph(heads), enough).float_bytes
    assert max(chunk, graph, chunk_graph) == workspace_bytes(heads)
    for _ in range(100):
        for eager in (random_chunks(heads, rng), random_decodes(heads, rng)):
            assert planner.plan(eager, enough).float_bytes <= chunk
        assert planner.plan(random_graph(heads, rng), enough).float_bytes <= graph
        assert planner.plan(random_chunk_graph(heads, rng), enough).float_bytes <= chunk_graph
    with pytest.raises(PlanError):
        planner.plan(largest_chunk(heads), chunk - 1)


@every_shape
def test_the_plans_of_a_graph_differ_only_in_what_it_reads_at_run_time(
    planner: Planner, heads: Heads
) -> None:
    rng = np.random.default_rng(3)
    for size in graph_sizes(LARGEST_GRAPH):
        recorded = planner.plan(graph_request(heads, np.ones(size, int)), 2**33).info
        for longest in (2, 100, 2000, MAX_LEN):
            kv_lens = rng.integers(1, longest, size)
            assert planner.plan(graph_request(heads, kv_lens), 2**33).info == recorded


@pytest.mark.parametrize("heads", _FOR_CUDA_CORES.values(), ids=_FOR_CUDA_CORES)
def test_so_do_those_for_cuda_cores(planner: Planner, heads: Heads) -> None:
    rng = np.random.default_rng(6)
    for size in graph_sizes(LARGEST_GRAPH):
        plans = []
        for longest in (2, 100, 2000, MAX_LEN):
            decodes = graph_request(heads, rng.integers(1, longest, size))
            plans.append(planner.plan_decode(decodes, 2**33).info)
        assert plans == plans[:1] * 4


@every_shape
def test_the_plans_of_chunks_in_a_graph_differ_only_in_what_it_reads_at_run_time(
    planner: Planner, heads: Heads
) -> None:
    rng = np.random.default_rng(5)
    for num_tokens in {shape.num_chunk_tokens for shape in CHUNK_GRAPHS}:
        padding = np.array([num_tokens] + [0] * (CHUNKS - 1))
        recorded = planner.plan(request(heads, padding, padding, in_graph=True), 2**33).info
        for _ in range(20):
            again = planner.plan(random_chunk_graph(heads, rng, num_tokens), 2**33)
            assert again.info == recorded
