"""FlashInfer's workspace is as large as its planner can need, and no larger."""

from __future__ import annotations

import numpy as np
import pytest

from minisrv.engine.attention.workspace import workspace_bytes
from minisrv.engine.graph_shapes import CHUNKS
from tests.support.flashinfer_planner import NUM_SMS, Heads, float_bytes

SHAPES = {
    "Qwen3-0.6B": Heads(16, 8, 128),
    "Qwen3-8B": Heads(32, 8, 128),
    "Qwen3-14B": Heads(40, 8, 128),
    "Qwen3-32B": Heads(64, 8, 128),
    "Qwen3-30B-A3B": Heads(32, 4, 128),
    "Qwen3-30B-A3B, one of 4 ranks": Heads(8, 1, 128),
    "Qwen2.5-0.5B": Heads(14, 2, 64),
    "Llama-3.2-1B": Heads(32, 8, 64),
    "Gemma-2-9B": Heads(16, 8, 256),
    "group of 32": Heads(32, 1, 128),
    "group of 71": Heads(71, 1, 64),
}


def enough(heads: Heads, largest_graph: int, chunk_tokens: int = 0) -> int:
    return workspace_bytes(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        num_sms=NUM_SMS,
        largest_graph=largest_graph,
        chunk_tokens=chunk_tokens,
    )


def needed(
    heads: Heads, query_lens: np.ndarray, kv_lens: np.ndarray, in_graph: bool, uniform: bool = True
) -> int:
    return float_bytes(
        heads, query_lens, kv_lens, num_sms=NUM_SMS, in_graph=in_graph, uniform=uniform
    )


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
def test_it_is_enough_for_steps_of_any_lengths(heads: Heads) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(1, 6))
        chunks = rng.integers(1, int(rng.choice([20, 600, 8192])), size)
        contexts = chunks + rng.integers(0, int(rng.choice([1, 5000, 40000])), size)
        assert needed(heads, chunks, contexts, False) <= enough(heads, 0)
        size = int(rng.integers(1, 600))
        one, lens = np.ones(size, int), rng.integers(1, int(rng.choice([2, 3000, 40000])), size)
        assert needed(heads, one, lens, False) <= enough(heads, 0)
        assert needed(heads, one, lens, True) <= enough(heads, size)


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("largest_graph", [0, 8, 256, 512])
def test_some_plan_takes_all_of_it(heads: Heads, largest_graph: int) -> None:
    most = 2 * NUM_SMS // heads.num_kv_heads
    rows = 64 if heads.head_dim >= 256 else 128
    chunk = np.array([max(1, rows // heads.group)])
    found = [needed(heads, chunk, np.array([8 * most * heads.page_size]), False)]
    if largest_graph:
        one = np.ones(largest_graph, int)
        found.append(needed(heads, one, one, True))
    assert max(found) == enough(heads, largest_graph)


@pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("chunk_tokens", [64, 300, 512, 4096])
def test_it_is_enough_for_the_chunks_of_a_graph_and_no_larger(
    heads: Heads, chunk_tokens: int
) -> None:
    rng, eager, found = np.random.default_rng(0), enough(heads, 0), []
    for _ in range(100):
        total = chunk_tokens if not found else int(rng.integers(2 * CHUNKS, chunk_tokens + 1))
        ends = np.sort(rng.integers(0, total + 1, CHUNKS - 1))
        lens = np.diff([0, *ends, total])
        contexts = lens + rng.integers(0, int(rng.choice([1, 5000, 40000])), CHUNKS) * (lens > 0)
        found.append(needed(heads, lens, contexts, True, uniform=False))
    assert max([eager, *found]) == max(eager, found[0]) == enough(heads, 0, chunk_tokens)


def test_64_heads_take_more_than_flashinfer_recommends() -> None:
    assert enough(SHAPES["Qwen3-32B"], 256) > 128 * 2**20
    assert enough(SHAPES["Qwen3-0.6B"], 256) < 40 * 2**20
