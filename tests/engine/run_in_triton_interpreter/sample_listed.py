"""Filtered sampling among the listed parts of a row, in Triton's interpreter.

Run by test_triton_kernels.py with it turned on.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minisrv.engine.kernels import triton_sample
from tests.support.device_draws import SearchCount, draw
from tests.support.gumbel import CASES, VOCAB, expected, random_logits
from tests.support.step_driver import sampling_columns

pytestmark = pytest.mark.usefixtures("small_blocks")

# Temperature, and filters that the listed parts satisfy, or not, at 16 parts of 4 tokens.
FEW_KEPT = [
    (0.6, {"top_k": 8, "top_p": 0.95}),
    (0.05, {"top_k": 8, "top_p": 0.95}),
    (30.0, {"top_k": 8, "top_p": 0.95}),
    (0.6, {"top_k": 1}),
    (2.0, {"top_k": 8}),
    (0.6, {"top_p": 0.5}),
    (1.0, {"top_p": 1e-6}),
    (0.3, {"min_p": 0.05}),
]
MANY_KEPT = [
    (1.0, {"top_k": 100}),
    (1.0, {"top_k": 299, "top_p": 0.99}),
    (5.0, {"top_p": 0.99}),
    (20.0, {"min_p": 0.1}),
    (20.0, {"min_p": 0.1, "top_p": 0.9}),
]


@pytest.mark.parametrize(
    ("temperature", "case", "dtype"),
    [
        (*FEW_KEPT[0], torch.float32),
        pytest.param(*MANY_KEPT[1], torch.bfloat16, marks=pytest.mark.soak),
        *(pytest.param(*case, torch.float32, marks=pytest.mark.soak) for case in FEW_KEPT[1:]),
        *(pytest.param(*case, torch.float32, marks=pytest.mark.soak) for case in MANY_KEPT),
        pytest.param(*FEW_KEPT[0], torch.bfloat16, marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_the_listed_parts_give_the_tokens_of_the_whole_row(
    temperature: float,
    case: dict[str, float],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = 2
    logits, positions = random_logits(rows, dtype, seed=11), np.arange(rows)
    columns = sampling_columns(rows, temperature=temperature, seeds=positions, **case)
    searched = SearchCount(monkeypatch)
    ours = draw(logits, columns, positions)
    assert searched.rows == (0 if (temperature, case) in FEW_KEPT else rows)
    assert ours.tolist() == expected(logits, columns, positions).tolist()
    monkeypatch.setattr(triton_sample, "_MOST_PARTS", 1)
    assert ours.tolist() == draw(logits, columns, positions).tolist()


def test_equal_maxima_of_more_parts_than_fit_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 3
    logits, positions = torch.zeros(rows, VOCAB), np.arange(rows)
    logits[:, 17] = 1.0
    columns = sampling_columns(rows, temperature=1.0, top_k=[1, 2, 40])
    searched = SearchCount(monkeypatch)
    ours = draw(logits, columns, positions)
    assert searched.rows == rows - 1
    assert ours.tolist() == expected(logits, columns, positions).tolist()


@pytest.mark.parametrize(
    "allowed", [1, *(pytest.param(n, marks=pytest.mark.soak) for n in (3, 40))]
)
def test_rows_in_which_few_tokens_are_possible_are_not_searched(
    allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a grammar leaves them: some of the filters keep every token that is possible."""
    rows = len(CASES)
    logits, positions = random_logits(rows, seed=2), np.arange(rows)
    places = torch.arange(VOCAB) % (VOCAB // allowed) == 0
    logits[:, ~places] = -torch.inf
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    filters = {name: [case.get(name, off) for case in CASES] for name, off in defaults.items()}
    columns = sampling_columns(rows, temperature=3.0, **filters)
    searched = SearchCount(monkeypatch)
    ours = draw(logits, columns, positions)
    assert ours.tolist() == expected(logits, columns, positions).tolist()
    assert bool(searched.rows) == (allowed > 16)


@pytest.mark.soak
def test_most_rows_of_a_real_size_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Qwen3's defaults, at the sizes of the kernels, over a vocabulary of 152k."""
    monkeypatch.undo()
    rows, vocab = 3, 151_936
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator) * 2.5
    logits[1] = logits[1].sort(descending=True).values  # frequent tokens have low ids
    logits[2, 5000:5064] += 12
    columns = sampling_columns(rows, temperature=0.6, top_k=20, top_p=0.95)
    searched = SearchCount(monkeypatch)
    ours = draw(logits, columns, np.arange(rows))
    assert searched.rows == 0
    assert ours.tolist() == expected(logits, columns, np.arange(rows)).tolist()
