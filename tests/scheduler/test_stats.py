"""What the loop tells of its steps, and of when things happened."""

from __future__ import annotations

import pytest

from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.stats import PERIOD_S, Rate
from minisrv.wire.messages import AbortMsg, AnswerMsg, FlushMsg, Start, StatsMsg
from tests.support.builders import generate_msg, hash_loop


class Clock:
    """Time goes on by `tick` with each look at it."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 100.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


def run(loop: SchedulerLoop) -> list[Start]:
    starts: list[Start] = []
    while loop.busy or loop.channel.inbox:
        loop.turn()
        while loop.channel.outbox:
            starts += loop.channel.outbox.popleft().starts
    return starts


def last_stats(loop: SchedulerLoop) -> StatsMsg:
    return [message for message in loop.channel.sent_to_frontend if isinstance(message, StatsMsg)][
        -1
    ]


@pytest.mark.parametrize("depth", [0, 1])
def test_every_token_is_counted_once_and_all_but_first_ones_have_an_interval(depth: int) -> None:
    loop = hash_loop(num_pages=60, page_size=4, depth=depth)
    for uid in range(3):
        loop.channel.inbox.append(generate_msg(uid, [1] * 9 + [uid], max_tokens=5 + uid))
    run(loop)
    stats = last_stats(loop)
    assert stats.output_tokens == 5 + 6 + 7
    assert stats.inter_token.counts.sum() == stats.output_tokens - 3
    assert stats.prompt_tokens == 30
    assert stats.cached_tokens == 16
    assert stats.prefilled_tokens == 30 - 16
    assert stats.steps == stats.step_tokens.counts.sum()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_retracted_requests_are_counted_and_their_wait_is_an_interval() -> None:
    loop = hash_loop(num_pages=8, page_size=2, num_rows=4)
    for uid in range(3):
        loop.channel.inbox.append(generate_msg(uid, [uid, uid], max_tokens=9))
    run(loop)
    stats = last_stats(loop)
    assert stats.preemptions > 0
    assert stats.output_tokens == 27
    assert stats.inter_token.counts.sum() == 27 - 3


def test_queue_and_prefill_are_measured_on_the_loops_clock(clock: Clock) -> None:
    loop = hash_loop(clock=clock.monotonic, num_pages=60, page_size=4, num_rows=1, budget=4)
    loop.channel.inbox.append(generate_msg(0, [1] * 4, max_tokens=1))
    loop.channel.inbox.append(generate_msg(1, [2] * 8, max_tokens=3))
    clock.tick = 1.0
    first, second = sorted(run(loop), key=lambda start: start.uid)
    # Arrived at 101. Each turn looks twice: to schedule, and to settle.
    assert (first.queue_s, first.prefill_s) == (1.0, 1.0)
    assert (second.queue_s, second.prefill_s) == (3.0, 3.0)
    stats = last_stats(loop)
    assert stats.inter_token.total == 2 * 2.0


def test_a_request_aborted_in_the_queue_counts_no_prompt() -> None:
    loop = hash_loop(num_rows=1)
    loop.channel.inbox.append(generate_msg(0, [1] * 4, max_tokens=2))
    loop.channel.inbox.append(generate_msg(1, [2] * 4, max_tokens=2))
    loop.turn()
    loop.channel.inbox.append(AbortMsg(uids=(1,)))
    run(loop)
    assert last_stats(loop).prompt_tokens == 4


def test_figures_go_out_on_a_period_and_when_the_loop_becomes_idle(clock: Clock) -> None:
    loop = hash_loop(clock=clock.monotonic, num_pages=60, page_size=4)
    loop.channel.inbox.append(generate_msg(0, [1] * 4, max_tokens=30))
    loop.turn()
    assert len(loop.channel.sent_to_frontend) == 1
    loop.turn()
    assert len(loop.channel.sent_to_frontend) == 1
    clock.now += PERIOD_S
    loop.turn()
    assert len(loop.channel.sent_to_frontend) == 2
    stats = last_stats(loop)
    assert (stats.running, stats.pages_used, stats.num_pages, stats.page_size) == (1, 2, 60, 4)
    run(loop)
    assert last_stats(loop).running == 0


def test_a_flush_empties_the_cache_of_an_idle_scheduler_only() -> None:
    loop = hash_loop(num_pages=60, page_size=4)
    loop.channel.inbox.append(generate_msg(0, list(range(17)), max_tokens=30))
    loop.channel.inbox.append(FlushMsg(query=5))
    loop.turn()
    refused, _ = loop.channel.sent_to_frontend
    assert isinstance(refused, AnswerMsg)
    assert refused.query == 5
    assert refused.failure is not None
    assert refused.failure.status == 400
    run(loop)
    assert loop.scheduler.cache.tree.num_evictable > 0
    loop.channel.inbox.append(FlushMsg(query=6))
    loop.turn()
    (done,) = [
        m for m in loop.channel.sent_to_frontend if isinstance(m, AnswerMsg) and m.query == 6
    ]
    assert done.value["pages"] == 11
    assert loop.scheduler.cache.tree.num_evictable == 0
    loop.scheduler.check()
    loop.channel.inbox.append(generate_msg(1, list(range(17)), max_tokens=2))
    (start,) = run(loop)
    assert start.cached_tokens == 0


def test_a_prompt_without_output_takes_no_interval_from_others() -> None:
    loop = hash_loop(num_pages=60, page_size=4)
    loop.channel.inbox.append(generate_msg(0, [1] * 4, max_tokens=6))
    for uid in range(1, 5):
        loop.turn()
        loop.channel.inbox.append(generate_msg(uid, [uid] * 4, max_tokens=0, prompt_logprobs=0))
    run(loop)
    stats = last_stats(loop)
    assert stats.output_tokens == 6
    assert stats.inter_token.counts.sum() == 5


def test_queued_tokens_are_those_of_open_prompts_that_are_not_computed() -> None:
    loop = hash_loop(num_pages=60, page_size=4, num_rows=1, budget=4)
    loop.channel.inbox.append(generate_msg(0, [1] * 10, max_tokens=5))
    loop.channel.inbox.append(generate_msg(1, [2] * 7, max_tokens=5))
    loop.turn()
    assert loop.stats.make_message(loop.scheduler).queued_tokens == 10 - 4 + 7
    run(loop)
    assert loop.stats.make_message(loop.scheduler).queued_tokens == 0


def test_rates_are_tokens_per_second_of_the_steps_that_compute_them(clock: Clock) -> None:
    loop = hash_loop(clock=clock.monotonic, num_pages=60, page_size=4, budget=4, depth=1)
    assert loop.stats.make_message(loop.scheduler).prefill_rate == 0
    loop.channel.inbox.append(generate_msg(0, [1] * 8, max_tokens=3))
    loop.channel.inbox.append(generate_msg(1, [2] * 8, max_tokens=9))
    while loop.busy or loop.channel.inbox:
        clock.now += 0.5  # a step is settled one turn after the one before
        loop.turn()
    clock.now += 1000  # time without work does not count
    loop.turn()
    stats = last_stats(loop)
    assert stats.prefill_rate == pytest.approx(4 / 0.5)
    assert 1 / 0.5 < stats.decode_rate < 2 / 0.5


def test_recent_work_counts_more_in_a_rate() -> None:
    rate = Rate()
    assert rate.value == 0
    rate.add(1000, 10.0)
    assert rate.value == 100
    rate.add(2000, 10.0)
    assert rate.value == pytest.approx((500 + 2000) / (5 + 10))
    for _ in range(100):
        rate.add(3, 1.0)
    assert rate.value == pytest.approx(3, rel=0.1)
