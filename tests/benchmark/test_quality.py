"""The measurement of quality: its arithmetic, and its logprobs of the engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("quality") / "tiny", "qwen3")


def make_windows() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (40, 33)]


@pytest.mark.parametrize("step_tokens", [1, 7, 500])
def test_the_logprobs_of_the_engine_are_those_of_transformers(
    step_tokens: int, checkpoint: Path
) -> None:
    import quality

    windows = make_windows()
    exact = quality.exact_logprobs(checkpoint, windows)
    ours = list(
        quality.engine_logprobs(checkpoint, windows, step_tokens, dtype="float32", num_threads=1)
    )
    assert [tuple(window.shape) for window in ours] == [(40, 384), (33, 384)]
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-3)
    found = quality.score(iter(ours), windows, exact, exact)
    assert found.kl == found.own_kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1


def test_a_score_is_the_mean_over_all_tokens() -> None:
    import quality

    generator = torch.Generator().manual_seed(0)
    windows = [[1, 2, 3, 4], [5, 6]]
    exact, own, logprobs = (
        [torch.randn(len(ids), 8, generator=generator).log_softmax(-1) for ids in windows]
        for _ in range(3)
    )
    found = quality.score(iter(logprobs), windows, exact, own)
    flat, following = torch.cat([logprobs[0][:3], logprobs[1][:1]]), torch.tensor([2, 3, 4, 6])
    loss = functional.nll_loss(flat, following)
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    for value, reference in ((found.kl, exact), (found.own_kl, own)):
        expected = functional.kl_div(
            torch.cat(logprobs), torch.cat(reference), reduction="batchmean", log_target=True
        )
        assert value == pytest.approx(float(expected), rel=1e-5)
    assert 0 <= found.agreement < 1
    assert quality.score(iter(exact), windows, exact).cells()[1:] == ["0.00e+00", "", "100.00%"]
