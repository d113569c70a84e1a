"""Which deaths lead to a restart, and after how long."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from minisrv.restart_limit import RestartLimit
from minisrv.supervision.restarts import Restarts


def make(limit: str) -> Restarts:
    return Restarts(RestartLimit.parse(limit))


def test_the_delay_grows_and_the_last_death_is_one_too_many() -> None:
    restarts = make("5/60")
    assert [restarts.delay_s(now) for now in (0.0, 1.0, 2.0, 3.0)] == [0.2, 1.0, 5.0, 5.0]
    assert restarts.delay_s(4.0) is None
    assert "death number 5 within 60 s" in restarts.refusal


def test_deaths_that_are_long_past_do_not_count() -> None:
    restarts = make("2/10")
    assert restarts.delay_s(0.0) == 0.2
    assert restarts.delay_s(10.5) == 0.2
    assert restarts.delay_s(20.0) is None


def test_without_restarts_the_first_death_is_one_too_many() -> None:
    restarts = make("0")
    assert restarts.delay_s(0.0) is None
    assert restarts.refusal == ""


@given(st.lists(st.floats(0, 200), min_size=1).map(sorted), st.integers(1, 5), st.integers(1, 60))
def test_exactly_the_deaths_within_the_period_count(
    times: list[float], deaths: int, seconds: int
) -> None:
    restarts = make(f"{deaths}/{seconds}")
    for i, now in enumerate(times):
        recent = sum(at > now - seconds for at in times[: i + 1])
        assert (restarts.delay_s(now) is None) == (recent >= deaths)


def test_each_process_is_due_once_at_its_time() -> None:
    restarts = make("3/60")
    assert restarts.next_at == math.inf
    restarts.add("tokenizer", 1, 5.0)
    restarts.add("scheduler", 0, 3.0)
    assert restarts.next_at == 3.0
    assert restarts.take_due(2.9) == []
    assert restarts.take_due(3.0) == [("scheduler", 0)]
    assert restarts.take_due(9.0) == [("tokenizer", 1)]
    assert (restarts.take_due(9.0), restarts.next_at) == ([], math.inf)
