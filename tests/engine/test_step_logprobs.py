"""Log-probabilities of a step by themselves: floors, slices, and none for other ranks."""

import math

import numpy as np
import pytest
import torch

from minisrv.engine.forward_batch import LogprobColumns
from minisrv.engine.sampling.logprobs import FLOOR, SLICE, StepLogprobs, add_prompt_in_slices


def columns(samples: list[int], prompt_ids: list[int], num_top: int) -> LogprobColumns:
    return LogprobColumns(num_top, np.array(samples, np.int32), np.array(prompt_ids, np.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_the_logits_before_the_draw_changes_these(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = logits.double().log_softmax(-1)
    step = StepLogprobs(logits, columns([1, 3], [], 5))
    logits.fill_(-math.inf)
    logprobs = step.finish(torch.tensor([7, 8, 9, 10])).to_numpy()
    assert logprobs.logprobs == pytest.approx(
        [float(expected[1, 8]), float(expected[3, 10])], abs=1e-6
    )
    for row, sample in enumerate((1, 3)):
        best = expected[sample].topk(5)
        assert logprobs.top_logprobs[row] == pytest.approx(best.values.numpy(), abs=1e-6)
        assert (expected[sample][logprobs.top_ids[row]] - best.values).abs().max() < 1e-6


def test_what_cannot_come_has_the_floor_and_no_infinity() -> None:
    logits = torch.full((2, 8), -math.inf)
    logits[0, 3] = 1.0
    logits[1] = math.nan
    logprobs = StepLogprobs(logits, columns([0, 1], [], 2)).finish(torch.tensor([5, 5])).to_numpy()
    assert logprobs.logprobs.tolist() == [FLOOR, FLOOR]
    assert logprobs.top_ids[0, 0] == 3
    assert logprobs.top_logprobs.tolist() == [[0.0, FLOOR], [FLOOR, FLOOR]]


def test_a_prompt_is_scored_in_slices_behind_the_samples() -> None:
    count = 2 * SLICE + 5
    logits = torch.randn(count + 1, 20, generator=torch.Generator().manual_seed(2))
    ids = [i % 20 for i in range(count)]
    step = StepLogprobs(logits[:1], columns([0], ids, 1))
    sizes = []

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens))
        return logits[tokens]

    add_prompt_in_slices(step, torch.arange(1, count + 1), logits_of)
    assert sizes == [SLICE, SLICE, 5]
    logprobs = step.finish(torch.tensor([4])).to_numpy()
    expected = logits.log_softmax(-1)
    wanted = [float(expected[0, 4]), *(float(expected[i + 1, id]) for i, id in enumerate(ids))]
    assert logprobs.logprobs == pytest.approx(wanted, abs=1e-6)
    assert logprobs.top_logprobs[:, 0] == pytest.approx(expected.amax(-1).numpy(), abs=1e-6)


def test_a_rank_above_0_computes_its_share_of_every_slice() -> None:
    asked = []
    add_prompt_in_slices(
        None, torch.arange(SLICE + 1), lambda tokens: asked.append(tokens) or tokens
    )
    assert [len(tokens) for tokens in asked] == [SLICE, 1]
