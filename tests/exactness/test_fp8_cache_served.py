"""The FP8 cache through the scheduler: the text is the same cold and warm, on one rank and two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exactness.test_tensor_parallel import WAY, parallel_loop
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.support.oracle import make_prompts, run


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("llama", marks=pytest.mark.soak)])
def test_a_warm_prompt_has_the_text_of_a_cold_one(tmp_path: Path, architecture: str) -> None:
    model_dir = make_checkpoint(tmp_path, architecture)
    prompts = make_prompts(12, VOCAB_SIZE, longest=200)
    with parallel_loop(model_dir, 1, page_size=4, num_pages=2000, kv_cache_dtype="fp8") as loop:
        cold, _ = run(loop, prompts, 1)
        warm, cached = run(loop, prompts, 1)
        together, _ = run(loop, prompts, 12)
    assert sum(cached) > 0.8 * sum(map(len, prompts))
    assert warm == cold
    assert together == cold


@pytest.mark.soak
def test_two_ranks_give_the_text_of_one(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "qwen3")
    prompts = make_prompts(8, VOCAB_SIZE, longest=120)
    texts = []
    for tp in (1, 2):
        # So few pages that requests are preempted and go on.
        with parallel_loop(model_dir, tp, num_pages=14, kv_cache_dtype="fp8") as loop:
            outputs, _ = run(loop, prompts, WAY.at_once)
            assert loop.scheduler.num_preemptions > 0
            loop.scheduler.check()
        texts.append(outputs)
    assert texts[0] == texts[1]
