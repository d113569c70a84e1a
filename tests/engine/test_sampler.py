"""Draws against exact probabilities, filters against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.sampling import sampler
from minisrv.engine.sampling.sampler import _probabilities
from minisrv.engine.sampling.uniform import uniforms
from minisrv.wire.arrays import Int64Array
from tests.support.step_driver import sampling_columns

VOCAB = 50
CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 7},
    {"temperature": 0.8, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 1e-6},
]


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: torch.Tensor, columns: SamplingColumns, positions: Int64Array) -> torch.Tensor:
    return sampler.sample(logits, columns, positions, TorchKernels())


def transformers_probabilities(logits: torch.Tensor, case: dict[str, float]) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(case["temperature"])])
    if case.get("top_k"):
        warpers.append(TopKLogitsWarper(int(case["top_k"])))
    if case.get("top_p", 1) < 1:
        warpers.append(TopPLogitsWarper(case["top_p"]))
    if case.get("min_p"):
        warpers.append(MinPLogitsWarper(case["min_p"]))
    return warpers(None, logits.double()).softmax(-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_filtered_probabilities_are_those_of_transformers(case: dict[str, float]) -> None:
    logits = random_logits(40)
    columns = sampling_columns(40, **case)
    ours = _probabilities(logits, columns, np.arange(40))
    ours = ours / ours.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, transformers_probabilities(logits, case), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES[:7], ids=str)
def test_draws_follow_the_filtered_probabilities(case: dict[str, float]) -> None:
    logits, count = random_logits(1, seed=3), 20000
    columns = sampling_columns(count, **case, seeds=7)
    drawn = sample(logits.repeat(count, 1), columns, np.arange(count))
    expected = transformers_probabilities(logits, case)[0].numpy() * count
    seen = np.bincount(drawn.numpy(), minlength=VOCAB)
    assert seen[expected == 0].sum() == 0
    likely = expected >= 5
    chi_square = ((seen - expected) ** 2 / np.where(likely, expected, 1))[likely].sum()
    freedom = max(1, int(likely.sum()) - 1)
    # 5 standard deviations of a chi-square variable: one false alarm in millions, and no chance
    # here at all, as the draws are the same each time.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_a_row_is_drawn_alike_alone_and_beside_any_neighbours() -> None:
    logits = random_logits(len(CASES), seed=5)
    rows = {
        name: [case.get(name, default) for case in CASES]
        for name, default in {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}.items()
    }
    seeds, positions = list(range(len(CASES))), np.arange(len(CASES)) + 10
    together = sample(logits.clone(), sampling_columns(len(CASES), **rows, seeds=seeds), positions)
    for i in range(len(CASES)):
        one = {name: values[i] for name, values in rows.items()}
        columns = sampling_columns(1, **one, seeds=i)
        assert (
            sample(logits[i : i + 1].clone(), columns, positions[i : i + 1]).item() == together[i]
        )


def test_greedy_rows_take_the_best_token_beside_rows_that_draw() -> None:
    logits = random_logits(64, seed=6)
    temperature = np.arange(64) % 2 * 5.0
    drawn = sample(logits.clone(), sampling_columns(64, temperature=temperature), np.arange(64))
    best = logits.argmax(-1)
    assert drawn[::2].tolist() == best[::2].tolist()
    assert drawn[1::2].tolist() != best[1::2].tolist()


def test_a_suppressed_token_is_never_taken() -> None:
    logits = random_logits(8, seed=8)
    best = logits.argmax(-1).tolist()
    suppress = [(row, best[row]) for row in range(0, 8, 2)]
    greedy = sample(logits.clone(), sampling_columns(8, suppress=suppress), np.arange(8)).tolist()
    assert [greedy[row] == best[row] for row in range(8)] == [False, True] * 4
    second = logits.topk(2).indices[:, 1].tolist()
    assert greedy[::2] == second[::2]
    columns = sampling_columns(8, suppress=suppress, temperature=0.01)
    drawn = sample(logits.clone(), columns, np.arange(8)).tolist()
    assert all(drawn[row] != best[row] for row in range(0, 8, 2))


def test_top_k_keeps_the_lower_id_of_equal_tokens() -> None:
    columns = sampling_columns(200, temperature=1.0, top_k=3, seeds=np.arange(200))
    drawn = sample(torch.zeros(200, VOCAB), columns, np.zeros(200, np.int64))
    assert set(drawn.tolist()) == {0, 1, 2}


def test_a_draw_depends_on_seed_choice_and_position_each() -> None:
    base = (np.array([3]), np.array([0], np.int32), np.array([9]))
    changed = [
        (np.array([4]), base[1], base[2]),
        (base[0], np.array([1], np.int32), base[2]),
        (base[0], base[1], np.array([10])),
        (np.array([-3]), base[1], base[2]),
    ]
    values = [uniforms(*base)[0], *(uniforms(*other)[0] for other in changed)]
    assert len(set(values)) == len(values)
    assert uniforms(*base)[0] == values[0]


def test_uniforms_are_uniform_and_uncorrelated_along_positions_seeds_and_choices() -> None:
    count = 50000
    line, zero = np.arange(count), np.zeros(count, np.int64)
    for arguments in (
        (zero, zero.astype(np.int32), line),
        (line, zero.astype(np.int32), zero),
        (zero, line.astype(np.int32), zero),
    ):
        draws = uniforms(*arguments)
        assert draws.min() >= 0
        assert draws.max() < 1
        histogram = np.histogram(draws, bins=50, range=(0, 1))[0]
        assert ((histogram - count / 50) ** 2 / (count / 50)).sum() < 49 + 5 * 98**0.5
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 / count**0.5


def test_a_temperature_near_zero_and_extreme_logits_give_the_best_token() -> None:
    logits = random_logits(16, seed=9) * 1e4
    columns = sampling_columns(16, temperature=1e-30, top_p=0.5)
    assert sample(logits.clone(), columns, np.arange(16)).tolist() == logits.argmax(-1).tolist()
