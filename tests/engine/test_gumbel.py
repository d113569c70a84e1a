"""The rule of the device's sampler follows the filtered probabilities, at counts that the kernels
cannot reach in Triton's interpreter. There they are compared with the same rule.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minisrv.engine.sampling import sampler
from tests.support.gumbel import CASES, VOCAB, assert_follows, expected, noise, random_logits
from tests.support.step_driver import sampling_columns


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_filtered_probabilities(
    case: dict[str, float],
) -> None:
    count = 10_000
    logits, positions = random_logits(1, seed=3), np.arange(count)
    columns = sampling_columns(count, temperature=0.9, seeds=7, **case)
    drawn = expected(logits.repeat(count, 1), columns, positions)
    probabilities = sampler._probabilities(logits, columns, np.arange(1))[0]
    wanted = (probabilities / probabilities.sum() * count).numpy()
    assert_follows(np.bincount(drawn.numpy(), minlength=VOCAB), wanted)


def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should() -> None:
    """One token of 152k has 0.8 of the mass: the others, of 1.3e-6 each, share the rest."""
    vocab, count, tail = 152_000, 20, 0.2
    logits = torch.zeros(1, vocab, dtype=torch.float64)
    logits[0, 0] = np.log((1 - tail) / tail * (vocab - 1))
    drawn = []
    for start in range(0, 500, count):
        columns = sampling_columns(count, seeds=5)
        scores = logits + noise(columns, np.arange(start, start + count), vocab)
        drawn += scores.argmax(-1).tolist()
    others = [token for token in drawn if token]
    wanted = tail * len(drawn)
    assert abs(len(others) - wanted) < 4 * wanted**0.5
    halves = sum(token < vocab // 2 for token in others)
    assert abs(halves - len(others) / 2) < 5 * (len(others) / 4) ** 0.5
