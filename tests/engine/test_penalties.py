"""Penalties by compiled operators and by torch, and how many operations a step takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisrv.engine.forward_batch import Penalties
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.sampling.adjust import LogitAdjuster
from tests.support.kernels import implementations

CPU = torch.device("cpu")
MOST = 2**15 - 1
TOLERANCE = 1e-6


def make_penalties(rows: list[int], seed: int, vocab_size: int, **given: Any) -> Penalties:
    """Random ones for samples 0, 2, 4..., which are in `rows`; all of them begin.

    `given` replaces columns.
    """
    rng = np.random.default_rng(seed)
    count = len(rows)
    lens = rng.integers(0, 60, count, np.int32)
    columns = {
        "samples": np.arange(0, 2 * count, 2, dtype=np.int32),
        "rows": np.array(rows, np.int32),
        "presence": rng.uniform(-2, 2, count).astype(np.float32),
        "frequency": rng.uniform(-2, 2, count).astype(np.float32),
        "repetition": rng.uniform(0.1, 2, count).astype(np.float32),
        "begin_rows": np.array(rows, np.int32),
        "begin_lens": lens,
        "begin_prompt_lens": rng.integers(0, lens + 1, dtype=np.int32),
        "begin_ids": rng.integers(0, vocab_size, lens.sum(), np.int32),
        "bias_samples": np.array([0, 0, 0, 1], np.int32),  # the first token twice
        "bias_ids": np.array([3, 5, 3, 3], np.int32) % vocab_size,
        "bias_values": np.array([1, -2, 4, 8], np.float32),
    }
    return Penalties(**{**columns, **given})


def expected_logits(logits: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    """Token by token, in float64."""
    out = logits.double()
    ends = np.cumsum(penalties.begin_lens)
    for i, sample in enumerate(penalties.samples):
        ids = penalties.begin_ids[ends[i] - penalties.begin_lens[i] : ends[i]]
        output = Counter(ids[penalties.begin_prompt_lens[i] :].tolist())
        repetition = float(penalties.repetition[i])
        for token in set(ids.tolist()):
            x = out[sample, token]
            x = x / repetition if x > 0 else x * repetition
            x = x - output[token] * float(penalties.frequency[i])
            out[sample, token] = x - (output[token] > 0) * float(penalties.presence[i])
    biases = zip(penalties.bias_samples, penalties.bias_ids, penalties.bias_values, strict=True)
    for sample, token, value in biases:
        out[sample, token] += float(value)
    return out


@pytest.mark.parametrize("vocab_size", [1, 31, 64, 97, 1000, 40_000])
def test_all_implementations_follow_the_formulas(vocab_size: int) -> None:
    for seed in range(5):
        penalties = make_penalties([4, 0, 2], seed, vocab_size)
        logits = torch.randn(6, vocab_size) * 5
        logits[torch.rand(6, vocab_size) < 0.2] = -torch.inf
        logits[:, ::7] = 0
        expected = expected_logits(logits, penalties)
        for kernels in implementations(torch.float32):
            ours = logits.clone()
            LogitAdjuster(kernels, 5, vocab_size, CPU).adjust_(ours, penalties)
            assert not ours.isnan().any()
            torch.testing.assert_close(ours.double(), expected, rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_only_tokens_that_occur_change() -> None:
    """One in the prompt, one in the output, one in both; among them every bit of a bfloat16."""
    ids = np.array([1, 2, 3, 2], np.int32)  # the prompt is 1, 2
    column = np.ones(1, np.float32)
    penalties = make_penalties(
        [1],
        0,
        2**16,
        repetition=2 * column,
        frequency=0.25 * column,
        presence=0.5 * column,
        begin_lens=np.array([4], np.int32),
        begin_prompt_lens=np.array([2], np.int32),
        begin_ids=ids,
        bias_samples=ids[:0],
        bias_ids=ids[:0],
        bias_values=column[:0],
    )
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(1, -1)
    logits = bits.view(torch.bfloat16).float()
    logits[0, :5] = torch.tensor([8.0, 8.0, -8.0, 8.0, 8.0])
    finite = ~logits.isnan()
    for kernels in implementations(torch.float32):
        ours = logits.clone()
        LogitAdjuster(kernels, 2, 2**16, CPU).adjust_(ours, penalties)
        assert ours[0, :5].tolist() == [8, 4, -16.75, 3.25, 8]
        ours[0, :5] = logits[0, :5]
        assert torch.equal(ours[finite], logits[finite])
        assert torch.equal(ours.isnan(), ~finite)


def test_counts_stop_at_the_greatest_number_that_they_hold() -> None:
    ids = np.full(MOST + 10, 3, np.int32)
    lens = np.array([ids.size], np.int32)
    for num_brought in (ids.size, MOST - 1, MOST):
        adjuster = LogitAdjuster(TorchKernels(), 3, 8, CPU)
        penalties = make_penalties(
            [1],
            0,
            8,
            begin_lens=np.minimum(lens, num_brought),
            begin_prompt_lens=np.zeros_like(lens),
            begin_ids=ids[:num_brought],
        )
        adjuster.adjust_(torch.zeros(2, 8), penalties)
        for _ in range(3):
            adjuster.count_tokens(torch.full((2,), 3), penalties)
        assert adjuster.counts_RV[1, 3] == MOST
        assert adjuster.counts_RV.count_nonzero() == 1


def test_a_row_that_begins_leaves_the_others_as_they_are() -> None:
    adjuster = LogitAdjuster(TorchKernels(), 4, 500, CPU)
    adjuster.adjust_(torch.zeros(8, 500), make_penalties([0, 1, 2], 1, 500))
    before = adjuster.counts_RV.clone()
    begun = make_penalties([1, 3], 2, 500)
    adjuster.adjust_(torch.zeros(8, 500), begun)
    fresh = LogitAdjuster(TorchKernels(), 4, 500, CPU)
    fresh.adjust_(torch.zeros(8, 500), begun)
    assert torch.equal(adjuster.counts_RV[[0, 2]], before[[0, 2]])
    assert torch.equal(adjuster.counts_RV[[1, 3]], fresh.counts_RV[[1, 3]])


class OperationCount(TorchDispatchMode):
    """Counts torch's operations except views, and the calls of a compiled operator as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        wraps_an_array = func.__name__.startswith(("lift_fresh", "detach"))
        if not func.is_view and not wraps_an_array:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def penalize(self, kernels: Kernels) -> Kernels:
        """The kernels with their penalties counted as they are called."""
        if isinstance(kernels, TorchKernels):
            return kernels
        call = kernels.penalize_

        def counted(*args: Any) -> None:
            self.names.append("penalize_")
            call(*args)

        kernels.penalize_ = counted  # type: ignore[method-assign]
        return kernels


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(("index", "most"), [(0, 23), (1, 9)], ids=["torch", "compiled"])
def test_the_operations_of_a_step_do_not_depend_on_its_rows(
    index: int, most: int, begins: bool
) -> None:
    """With everything at once; `most` includes the start of rows."""
    found = []
    for num_rows in (1, 32, 256):
        kernels = implementations(torch.float32)[index:]
        if not kernels:
            pytest.skip("there is no C++ compiler here")
        count = OperationCount()
        adjuster = LogitAdjuster(count.penalize(kernels[0]), num_rows, 300, CPU)
        logits, tokens = torch.randn(2 * num_rows, 300), torch.randint(300, (2 * num_rows,))
        penalties = make_penalties(list(range(num_rows)), 0, 300)
        adjuster.adjust_(logits, penalties)
        if not begins:
            none = penalties.begin_ids[:0]
            nothing = dict.fromkeys(
                ("begin_rows", "begin_lens", "begin_prompt_lens", "begin_ids"), none
            )
            penalties = make_penalties(list(range(num_rows)), 0, 300, **nothing)
        with torch.inference_mode(), count:
            count.names.clear()
            adjuster.adjust_(logits, penalties)
            adjuster.count_tokens(tokens, penalties)
        found.append(count.names.copy())
    assert found[0] == found[1] == found[2]
    assert len(found[0]) <= most - (0 if begins else 2), found[0]
