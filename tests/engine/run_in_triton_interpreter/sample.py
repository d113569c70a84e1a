"""The sampling kernels in Triton's interpreter; run by test_triton_kernels.py with it turned on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from minisrv.engine.forward_batch import Penalties
from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kernels.triton_noise import gumbel, row_keys
from minisrv.engine.kernels.triton_sample import sample_on_device
from minisrv.engine.sampling import sampler
from minisrv.engine.sampling.adjust import LogitAdjuster
from minisrv.engine.sampling.device_columns import (
    BiasColumns,
    CountedPenalties,
    DeviceColumns,
    TokenBiases,
)
from tests.support.device_draws import CPU, draw
from tests.support.gumbel import CASES, VOCAB, assert_follows, expected, noise, random_logits
from tests.support.step_driver import sampling_columns

pytestmark = [pytest.mark.usefixtures("small_blocks"), pytest.mark.soak]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_penalties(samples: list[int], rows: list[int]) -> Penalties:
    """All kinds; each row begins with 30 random tokens, the first 20 of which are the prompt."""
    rng, count = np.random.default_rng(3), len(samples)
    none = np.empty(0, np.int32)
    return Penalties(
        samples=np.array(samples, np.int32),
        rows=np.array(rows, np.int32),
        presence=rng.uniform(0.5, 2, count).astype(np.float32),
        frequency=rng.uniform(0.5, 2, count).astype(np.float32),
        repetition=rng.uniform(1, 2, count).astype(np.float32),
        begin_rows=np.array(rows, np.int32),
        begin_lens=np.full(count, 30, np.int32),
        begin_prompt_lens=np.full(count, 20, np.int32),
        begin_ids=rng.integers(0, VOCAB, 30 * count, np.int32),
        bias_samples=none,
        bias_ids=none,
        bias_values=none.astype(np.float32),
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES]
    + [(case, dtype) for case in (CASES[0], CASES[-1]) for dtype in DTYPES],
    ids=str,
)
def test_the_draw_is_that_of_torch(case: dict[str, float], dtype: torch.dtype) -> None:
    rows = 4
    logits, positions = random_logits(rows, dtype), np.arange(rows)
    temperature = [0.1, 0.7, 1.0, 2.0]
    columns = sampling_columns(rows, temperature=temperature, seeds=positions - 9, **case)
    ours, theirs = draw(logits, columns, positions), expected(logits, columns, positions)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("case", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.7}])
def test_of_equal_tokens_the_lower_ids_are_kept(case: dict[str, float]) -> None:
    """Whole numbers: each cut goes through tokens that are equal, in several blocks."""
    rows = 10
    logits = random_logits(1).div(3).round().clamp(-2, 1).bfloat16().repeat(rows, 1)
    positions = np.arange(rows)
    columns = sampling_columns(rows, temperature=1.0, **case)
    ours = draw(logits, columns, positions)
    assert ours.tolist() == expected(logits, columns, positions).tolist()
    kept = sampler._probabilities(logits[:1], columns, np.arange(1))[0].nonzero().squeeze(1)
    assert set(ours.tolist()) <= set(kept.tolist())
    ties = (logits[0] == logits[0, kept].min()).nonzero().squeeze(1)
    assert len(ties) > len(set(ties.tolist()) & set(kept.tolist())) > 1


def test_a_row_of_minus_infinity_gives_a_token_whatever_its_filters() -> None:
    for case in CASES:
        columns = sampling_columns(1, temperature=1.0, **case)
        logits = torch.full((1, VOCAB), -torch.inf)
        assert draw(logits, columns, np.zeros(1, np.int64)).tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_rows_take_the_first_of_the_greatest_or_the_first_nan(dtype: torch.dtype) -> None:
    logits = random_logits(12, dtype).round()
    logits[1, 200] = logits[1, 70] = torch.nan
    logits[2] = -torch.inf
    logits[3] = -0.0
    logits[3, 90] = 0.0
    logits[4, 150] = torch.inf
    temperature = [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    columns = sampling_columns(12, temperature=temperature, top_k=3)
    taken = draw(logits, columns, np.zeros(12, np.int64))
    greedy = [i for i, value in enumerate(temperature) if value == 0]
    best = [TorchKernels().argmax(logits[i : i + 1]).item() for i in greedy]
    assert taken[greedy].tolist() == best
    assert best[1:5] == [70, 0, 0, 150]


def test_a_row_is_drawn_alike_alone_in_any_batch_and_beside_padding() -> None:
    rows = len(CASES)
    logits, positions = random_logits(rows, seed=5), np.arange(rows) + 10
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    filters: dict[str, list[float]] = {
        name: [case.get(name, default) for case in CASES] for name, default in defaults.items()
    }
    columns = sampling_columns(rows, temperature=1.0, seeds=np.arange(rows), **filters)
    together = draw(logits, columns, positions)
    for i in range(rows):
        own: dict[str, Any] = {name: [values[i], 1] for name, values in filters.items()}
        padded = sampling_columns(2, temperature=[1, 0], seeds=[i, 0], **own)
        pair = torch.cat([logits[i : i + 1], torch.full((1, VOCAB), torch.nan)])
        assert draw(pair, padded, np.array([i + 10, 0]))[0] == together[i]
        alone = sampling_columns(1, temperature=1.0, seeds=i, **{k: v[0] for k, v in own.items()})
        assert draw(pair[:1], alone, np.array([i + 10]))[0] == together[i]


def test_filtered_rows_return_the_first_nan_or_else_the_first_infinity() -> None:
    logits = random_logits(3, seed=4)
    logits[0, [90, 250]] = torch.nan
    logits[1, [40, 130]] = torch.inf
    logits[2, [70, 30]] = torch.tensor([torch.nan, torch.inf])
    for case in CASES[1:]:
        columns = sampling_columns(3, temperature=0.7, **case)
        if case != {"top_k": 1000}:  # which filters nothing
            with np.errstate(invalid="ignore"):
                assert draw(logits, columns, np.arange(3)).tolist() == [90, 40, 70]


def test_a_draw_depends_on_seed_choice_and_position_each() -> None:
    logits = torch.zeros(5, VOCAB)
    columns = sampling_columns(5, temperature=1.0, seeds=[3, -4, 3, 3, 3], choices=[0, 0, 1, 0, 0])
    drawn = draw(logits, columns, np.array([9, 9, 9, 8, 9])).tolist()
    assert len(set(drawn)) == 4
    assert drawn[0] == drawn[4]


def test_only_the_counted_pairs_are_suppressed() -> None:
    logits = random_logits(4)
    best = logits.argmax(-1).tolist()
    columns = sampling_columns(4, suppress=[(0, best[0]), (2, best[2]), (1, best[1])])
    given = DeviceColumns.from_host(columns, np.arange(4), CPU)
    given.biases.count[0] = 2
    taken = sample_on_device(logits.clone(), given, torch.zeros(4, dtype=torch.int32)).tolist()
    assert [taken[i] == best[i] for i in range(4)] == [False, True, False, True]


def test_biases_are_added_and_minus_infinity_suppresses() -> None:
    logits = random_logits(3)
    logits[2, 5], logits[2, 6] = torch.nan, torch.inf
    penalties = make_penalties([], [])
    penalties = replace(
        penalties,
        bias_samples=np.array([0, 1, 1], np.int32),
        bias_ids=np.array([7, 0, VOCAB - 1], np.int32),
        bias_values=np.array([2.5, -100.0, 100.0], np.float32),
    )
    columns = sampling_columns(3, suppress=[(0, 3), (1, 0), (2, 5), (2, 6)])
    given = DeviceColumns.from_host(columns, np.arange(3), CPU)
    biases = BiasColumns.from_host(TokenBiases.of_step(columns, penalties), CPU)
    changed = logits.clone()
    out = torch.zeros(3, dtype=torch.int64)
    with np.errstate(invalid="ignore"):
        sample_on_device(changed, replace(given, biases=biases), out)
    expected_logits = logits.clone()
    expected_logits[0, 7] += 2.5
    expected_logits[1, VOCAB - 1] += 100
    expected_logits[[0, 1, 2, 2], [3, 0, 5, 6]] = -torch.inf
    assert torch.equal(changed, expected_logits)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_and_counts_are_those_of_the_adjuster(temperature: float) -> None:
    """Rows 4, 0 and 3 have penalties, in samples 0, 1 and 3; sample 4 is padding."""
    logits = random_logits(5)
    given = make_penalties([0, 1, 3], [4, 0, 3])
    on_host = LogitAdjuster(TorchKernels(), 5, VOCAB, CPU)
    on_device = LogitAdjuster(TorchKernels(), 5, VOCAB, CPU)
    on_device.begin(given)
    columns = sampling_columns(5, temperature=[temperature] * 4 + [0], top_k=9, top_p=0.9)
    factors = torch.tensor([[1.0], [0.0], [0.0]]).repeat(1, 7)
    samples = given.samples.tolist()
    arrays = given.repetition, given.frequency, given.presence
    factors[:, samples] = torch.from_numpy(np.stack(arrays))
    penalties = CountedPenalties(
        on_device.counts_RV,
        PenaltyColumns(
            torch.arange(5), torch.tensor([4, 0, 1, 3, 5], dtype=torch.int32), factors[:, :5]
        ),
    )
    nothing = dict.fromkeys(
        ("begin_rows", "begin_lens", "begin_prompt_lens", "begin_ids"), np.empty(0, np.int32)
    )
    for position in range(3):
        positions = np.full(5, position)
        adjusted = logits.clone()
        on_host.adjust_(adjusted, given if position == 0 else replace(given, **nothing))
        theirs = adjusted.argmax(-1)
        if temperature:
            theirs = expected(adjusted, columns, positions)
        on_host.count_tokens(theirs, given)
        plain = DeviceColumns.from_host(columns, positions, CPU)
        out = torch.zeros(5, dtype=torch.int32)
        ours = sample_on_device(logits.clone(), replace(plain, penalties=penalties), out)
        assert ours[:4].tolist() == theirs[:4].tolist()
        assert torch.equal(on_device.counts_RV, on_host.counts_RV)
    assert not on_device.counts_RV[[1, 2]].any()


def test_counts_stop_at_the_most_that_they_hold() -> None:
    counts = torch.full((2, VOCAB), 2**15 - 2, dtype=torch.int16)
    factors = torch.tensor([[1.0], [0.5], [0.0]])
    columns = PenaltyColumns(torch.zeros(1, dtype=torch.int64), torch.tensor([1]), factors)
    plain = DeviceColumns.from_host(sampling_columns(1), np.zeros(1, np.int64), CPU)
    given = replace(plain, penalties=CountedPenalties(counts, columns))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 1e6
    for most in (2**15 - 1, 2**15 - 1):
        sample_on_device(logits.clone(), given, torch.zeros(1, dtype=torch.int64))
        assert counts[1, 7] == most
    counts[1, 7] = 0
    assert (counts[0] == 2**15 - 2).all()


def test_rows_of_logits_may_lie_apart() -> None:
    wide = random_logits(6)
    columns = sampling_columns(6, temperature=[0, 1, 1, 0, 1, 1], top_k=[0, 0, 4, 0, 4, 0])
    given = DeviceColumns.from_host(columns, np.arange(6), CPU)
    view = wide[:, :131].clone().contiguous()
    apart = sample_on_device(wide[:, :131], given, torch.zeros(6, dtype=torch.int64))
    assert apart.tolist() == draw(view, columns, np.arange(6)).tolist()


def test_a_temperature_near_zero_gives_the_best_token() -> None:
    logits = random_logits(3, seed=9) * 1e4
    for temperature in (1e-30, 1e-42):
        for case in ({}, {"top_p": 0.5}, {"top_k": 5}, {"min_p": 0.1}):
            columns = sampling_columns(3, temperature=temperature, **case)
            assert draw(logits, columns, np.arange(3)).tolist() == logits.argmax(-1).tolist()


def test_the_sampler_leaves_it_to_the_kernels_of_cuda() -> None:
    pytest.importorskip("flashinfer")
    from minisrv.engine.kernels.cuda import CudaKernels

    logits, positions = random_logits(6), np.arange(6)
    columns = sampling_columns(6, temperature=[0, 1, 1, 0, 1, 1], top_k=4, suppress=[(1, 3)])
    theirs = sampler.sample(logits.clone(), columns, positions, CudaKernels(joined=False))
    assert theirs.tolist() == draw(logits, columns, positions).tolist()
    drawn_on_cpu = sampler.sample(logits.repeat(1, 1), columns, positions, TorchKernels())
    assert theirs[[0, 3]].tolist() == drawn_on_cpu[[0, 3]].tolist()


@pytest.mark.parametrize(
    ("case", "count"),
    [({}, 200), ({"top_k": 6}, 40), ({"top_p": 0.6}, 40), ({"min_p": 0.2}, 40)],
)
def test_draws_follow_the_filtered_probabilities(case: dict[str, float], count: int) -> None:
    logits, positions = random_logits(1, seed=3).bfloat16(), np.arange(count)
    columns = sampling_columns(count, temperature=0.9, seeds=7, **case)
    drawn = draw(logits.repeat(count, 1), columns, positions)
    probabilities = sampler._probabilities(logits, columns, np.arange(1))[0]
    wanted = (probabilities / probabilities.sum() * count).numpy()
    assert_follows(np.bincount(drawn.numpy(), minlength=VOCAB), wanted)


def test_the_kernels_noise_is_exact_to_its_ends() -> None:
    """As float64 has it, for a million tokens."""
    size = 2**20
    ours = torch.empty(size)
    _write_noise[(1,)](ours, SIZE=size)
    columns = sampling_columns(1, seeds=-5, choices=1)
    theirs = noise(columns, np.array([77]), size)[0]
    assert ours.isfinite().all()
    assert theirs.max() > 12
    assert theirs.min() < -2.5
    # Where u is near 1 it is rounded to 2^-24, which moves -log(1 - u) by that over 1 - u.
    share = (-theirs).exp()
    assert ((ours - theirs).abs() < 4e-6 + 2.0**-24 * share.exp() / share).all()


@triton.jit
def _write_noise(out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    keys = row_keys(tl.full([], -5, tl.int64), tl.full([], 1, tl.int32), tl.full([], 77, tl.int64))
    tl.store(out + at, gumbel(at, keys[0], keys[1], keys[2]))
