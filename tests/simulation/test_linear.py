"""Rates of steps, fitted to measurements."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.errors import ConfigError
from minisrv.simulation.linear import Calibration, LinearStepTimes, Observation, fit
from minisrv.simulation.replica import ServerShape
from minisrv.simulation.step_times import StepWork

WORK = [
    *((1, tokens, tokens * (tokens + 1) / 2, 0, 0) for tokens in (1, 2, 16, 100, 400, 900)),
    *((1, 0, 0, n, n * context) for n in (1, 2, 4, 16, 64) for context in (50, 700, 3000)),
]
RATE = st.one_of(st.just(0.0), st.floats(1e-7, 1e-3))


def observations(rates: tuple[float, ...], noise: float = 0.0) -> list[Observation]:
    rng = np.random.default_rng(0)
    works = [Observation(*work, 1.0) for work in WORK]
    seconds = [float(np.dot(w.counts, rates)) for w in works]
    return [
        replace(w, seconds=s * (1 + noise * rng.standard_normal()))
        for w, s in zip(works, seconds, strict=True)
    ]


@given(st.tuples(st.floats(1e-5, 1e-2), RATE, RATE, RATE, RATE, RATE))
def test_rates_are_found_again(rates: tuple[float, ...]) -> None:
    found = fit(exact := observations(rates))
    for observation in exact:
        assert np.dot(observation.counts, astuple(found)) == pytest.approx(observation.seconds)


def test_no_rate_is_negative_where_plain_least_squares_has_one() -> None:
    noisy = observations((5e-3, 0.0, 1e-4, 0.0, 1e-6, 0.0), noise=0.3)
    rows = np.array([o.counts for o in noisy]) / np.array([[o.seconds] for o in noisy])
    assert (np.linalg.lstsq(rows, np.ones(len(rows)))[0] < 0).any()
    assert min(astuple(fit(noisy))) >= 0


def test_a_step_takes_the_sum_of_its_parts() -> None:
    times = LinearStepTimes(1.0, 0.1, 2.0, 3.0, 4.0, 5.0)
    work = StepWork(
        decodes=7, decode_context=11, chunks=1, prefill_tokens=13, prefill_pairs=17, samples=8
    )
    parts = [1, 0.1 * 4, 2 * 13, 3 * 17, 4 * 7, 5 * 11]
    assert times.device_s(work) == pytest.approx(sum(parts))
    observed = Observation(1, 13, 17, 7, 11, 0.0)
    assert np.dot(observed.counts, astuple(times)) == pytest.approx(sum(parts))
    one = StepWork(
        decodes=1, decode_context=11, chunks=0, prefill_tokens=0, prefill_pairs=0, samples=1
    )
    assert times.device_s(one) == pytest.approx(1 + 0.1 + 4 + 5 * 11)
    assert times.host_s(work) == 0


def test_a_calibration_is_written_and_read(tmp_path: Path) -> None:
    shape = ServerShape(num_pages=9, page_size=16, max_seq_len=99, max_prefill_tokens=64)
    made = observations((5e-3, 0.0, 1e-4, 0.0, 1e-6, 0.0))
    saved = Calibration("demo", shape, fit(made), made)
    saved.save(path := tmp_path / "times.json")
    assert Calibration.load(path) == saved
    assert max(map(abs, saved.errors())) < 1e-6
    path.write_text(path.read_text().replace("num_pages", "pages"))
    with pytest.raises(ConfigError, match="not a calibration"):
        Calibration.load(path)
