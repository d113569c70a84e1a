"""How many wait, how fast the queue moves, and what is refused because of it."""

from __future__ import annotations

import pytest

from minisrv.errors import OverloadedError
from minisrv.frontend.registry.queue_gauge import MIN_ADMITTED, QueueGauge
from minisrv.wire.messages import Finish
from tests.frontend.test_request_registry import make_message, make_registry
from tests.support.scripted_backend import reply, start_of, stats


def busy_gauge(rates: list[float], period_s: float = 0.5) -> QueueGauge:
    """A gauge after periods of these admissions per second, with 10 requests waiting."""
    gauge, now, admitted = QueueGauge(4), 100.0, 0.0
    gauge.take(stats(waiting=10, admitted=0), 10, now)
    for rate in rates:
        now += period_s
        admitted += rate * period_s
        gauge.take(stats(waiting=10, admitted=int(admitted)), 10, now)
    return gauge


def test_what_the_running_ones_leave_room_for_does_not_wait() -> None:
    gauge = QueueGauge(4)
    assert [gauge.waiting(n, n) for n in range(7)] == [0, 0, 0, 0, 0, 1, 2]


def test_the_schedulers_count_is_brought_up_to_date() -> None:
    gauge = QueueGauge(100)
    gauge.take(stats(waiting=5), 8, 0.0)  # three are in prefill, or on their way
    assert gauge.waiting(20, 8) == 5
    assert gauge.waiting(26, 14) == 11
    assert gauge.waiting(20, 2) == 0


@pytest.mark.parametrize("rate", [0.25, 2.0, 40.0])
def test_the_wait_follows_the_measured_rate(rate: float) -> None:
    gauge = busy_gauge([rate] * 200)
    wait_s = gauge.wait_s(30)
    assert wait_s is not None
    assert wait_s == pytest.approx(30 / rate, rel=0.1)
    assert gauge.retry_after_s(30) == pytest.approx(30 / rate, abs=1 + 3 / rate)


def test_a_new_rate_replaces_an_old_one_within_the_window() -> None:
    wait_s = busy_gauge([2.0] * 400 + [20.0] * 70).wait_s(10)
    assert wait_s == pytest.approx(0.5, rel=0.15)


def test_time_without_waiting_requests_does_not_count() -> None:
    gauge = busy_gauge([4.0] * 20)
    before = gauge.wait_s(10)
    for i in range(50):
        gauge.take(stats(waiting=0, admitted=40 + i), 0, 200.0 + i)
    assert gauge.wait_s(10) == before


def test_without_a_measurement_there_is_no_prediction() -> None:
    gauge = QueueGauge(4)
    gauge.take(stats(waiting=3), 3, 0.0)
    assert gauge.wait_s(3) is None
    assert gauge.retry_after_s(3) is None
    gauge.take(stats(waiting=3, admitted=stats().admitted), 3, 20.0)
    assert gauge.wait_s(3) == 60, "nothing began in 20 seconds"
    assert MIN_ADMITTED > 1


def test_requests_that_would_wait_are_refused_and_others_are_not() -> None:
    registry, _ = make_registry(max_running_requests=4, max_waiting_requests=2)
    bases = [registry.open() for _ in range(6)]
    with pytest.raises(OverloadedError) as refusal:
        registry.open()
    assert refusal.value.reason == "waiting_requests"
    assert registry.refused == {"waiting_requests": 1}
    for base in bases[:2]:
        registry.send(make_message(base))
        registry.deliver(reply(base, "a", 1, Finish.STOP, start=start_of(base)))
    with pytest.raises(OverloadedError):
        registry.open(3)
    registry.open(2)


def test_requests_that_waited_when_the_scheduler_died_and_have_left_do_not_wait() -> None:
    registry, _ = make_registry(max_waiting_requests=2)
    bases = [registry.open() for _ in range(4)]
    for base in bases:
        registry.send(make_message(base))
        registry.deliver(reply(base, "a", 1, start=start_of(base)))
    registry.receive(stats(waiting=4))  # preempted, or sent again after an earlier death
    registry.hold("the scheduler process has died")
    for base in bases:
        registry.abort(base)
    for base in (registry.open(), registry.open()):
        registry.abort(base)
    assert registry.num_open == 0
    assert not registry.refused


def test_a_predicted_wait_that_is_too_long_is_refused_with_the_prediction() -> None:
    registry, _ = make_registry(max_running_requests=4, max_queue_wait=1e9)
    for _ in range(24):
        registry.open()
    registry._queue = gauge = busy_gauge([4.0] * 20)
    registry.open()
    assert gauge.wait_s(21) == pytest.approx(5.25)
    registry._max_queue_wait = 5.0
    with pytest.raises(OverloadedError) as refusal:
        registry.open()
    assert refusal.value.reason == "queue_wait"
    assert refusal.value.retry_after_s == 7, "25 of 4 per second"
