"""The scheduler's policy, one rule per test, without an engine.

A `Driver` plans steps and settles them with made-up tokens; the invariants are checked after each
call.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest

from minisrv.kvcache.radix_tree import RadixTree
from minisrv.sampling_params import Grammar
from minisrv.scheduler.request import _MAY_BECOME, Request, Status
from minisrv.scheduler.scheduler import MAX_BYPASSES
from minisrv.scheduler.step_plan import StepOutcome, StepPlan
from minisrv.structured_output.matcher import Matcher
from minisrv.wire.messages import Finish, Start
from tests.support.builders import generate_msg, make_scheduler

TOKEN = 1000


class Driver:
    """A scheduler, its clock, and what it has replied."""

    def __init__(self, **options: Any) -> None:
        self.scheduler = make_scheduler(**options)
        self.now = 0.0
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, Finish] = {}
        self.starts: dict[int, Start] = {}
        self.failures: dict[int, str] = {}

    def add(self, uid: int, prompt: Sequence[int], salt: str = "", **sampling: Any) -> Request:
        self.scheduler.add_request(generate_msg(uid, prompt, salt, **sampling), self.now)
        self._collect()
        return self.scheduler._requests.get(uid)  # type: ignore[return-value]

    def abort(self, *uids: int) -> None:
        self.scheduler.abort_requests(uids, self.now)
        self._collect()

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.schedule(self.now)
        self._collect()
        return plan

    def settle(self, plan: StepPlan) -> StepOutcome:
        tokens = [TOKEN + plan.step_id] * len(plan.samples)
        outcome = self.scheduler.settle(plan, tokens, self.now)
        self._collect()
        return outcome

    def step(self) -> StepPlan:
        """Plan a step and settle it."""
        plan = self.plan()
        assert plan is not None
        self.settle(plan)
        return plan

    def finish(self) -> None:
        """Step until every request has ended; no page stays with anybody."""
        while self.scheduler.num_open:
            self.step()
        cache = self.scheduler.cache
        assert cache.num_available == cache.pages.size
        assert cache.rows.num_free == cache.rows.size

    def _collect(self) -> None:
        self.scheduler.check()
        replies = self.scheduler.take_replies()
        self.starts.update({start.uid: start for start in replies.starts})
        self.failures.update({failure.uid: failure.message for failure in replies.failures})
        columns = zip(replies.uids, replies.token_ids, replies.finishes, strict=True)
        for uid, token, finish in columns:
            assert uid not in self.ends, "a reply after the final one"
            if token >= 0:
                self.tokens[uid].append(token)
            if finish:
                self.ends[uid] = finish


def chunks(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(chunk.request.uid, chunk.start, chunk.length) for chunk in plan.prefills]


def decodes(plan: StepPlan) -> list[int]:
    return [request.uid for request in plan.decodes]


def prompt(uid: int, length: int) -> list[int]:
    """A prompt that shares no page with that of another uid."""
    return [uid] * length


# Decode first


def test_a_step_decodes_for_everybody_and_prefills_beside_it() -> None:
    driver = Driver(num_pages=60, budget=8)
    driver.add(0, prompt(0, 3))
    driver.add(1, prompt(1, 3))
    driver.step()
    driver.add(2, prompt(2, 20))
    for start in (0, 8):
        plan = driver.step()
        assert decodes(plan) == [0, 1]
        assert chunks(plan) == [(2, start, 8)], "decodes take nothing from the budget"
    plan = driver.step()
    assert [request.uid for request in plan.samples] == [0, 1, 2]


def test_the_longest_decode_comes_first_in_the_batch_and_gets_its_own_token() -> None:
    driver = Driver(num_pages=60, budget=64)
    for uid, length in enumerate((3, 17, 9, 17)):
        driver.add(uid, prompt(uid, length), max_tokens=4)
    driver.step()
    for _ in range(3):
        plan = driver.plan()
        assert plan is not None
        assert decodes(plan) == [1, 3, 2, 0], "the older of two of the same length comes first"
        order = [request.uid for request in plan.samples]
        driver.scheduler.settle(plan, [100 * uid + plan.step_id for uid in order], driver.now)
        driver._collect()
    for uid in range(4):
        assert driver.tokens[uid][1:] == [100 * uid + step for step in (2, 3, 4)]


def test_the_last_page_goes_to_a_decode_and_not_to_a_chunk() -> None:
    driver = Driver(num_pages=8, page_size=1, budget=1)
    driver.add(0, prompt(0, 1), max_tokens=7)
    driver.step()
    driver.add(1, prompt(1, 4), max_tokens=1)
    for _ in range(3):
        driver.step()
    assert driver.scheduler.cache.num_available == 1
    plan = driver.step()
    assert (decodes(plan), chunks(plan)) == ([0], [])
    driver.finish()


# The budget


def test_a_single_prompt_has_the_whole_budget() -> None:
    driver = Driver(num_pages=60, budget=8)
    driver.add(0, prompt(0, 20))
    assert [chunks(driver.step()) for _ in range(4)] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4)], []]


def test_the_oldest_prompt_leaves_a_quarter_of_the_budget_to_the_next() -> None:
    driver = Driver(num_pages=60, budget=8)
    for uid in range(3):
        driver.add(uid, prompt(uid, 20))
    assert chunks(driver.step()) == [(0, 0, 6), (1, 0, 2)]
    assert chunks(driver.step()) == [(0, 6, 6), (1, 2, 2)]


def test_the_oldest_prompt_leaves_no_more_than_the_next_needs() -> None:
    driver = Driver(num_pages=60, budget=16)
    driver.add(0, prompt(0, 30))
    driver.add(1, prompt(1, 1))
    assert chunks(driver.step()) == [(0, 0, 15), (1, 0, 1)]


def test_the_quarter_is_for_a_prompt_that_runs_before_one_that_waits() -> None:
    driver = Driver(num_pages=60, budget=8)
    driver.add(0, prompt(0, 20))
    driver.add(1, prompt(1, 3))
    driver.add(2, prompt(2, 20))
    assert chunks(driver.step()) == [(0, 0, 6), (1, 0, 2)]
    assert chunks(driver.step()) == [(0, 6, 7), (1, 2, 1)], "one token is all that 1 needs"


def test_what_the_others_leave_goes_back_to_the_oldest() -> None:
    driver = Driver(num_pages=60, budget=8)
    driver.add(0, prompt(0, 20))
    driver.add(1, prompt(1, 20), grammar=Grammar.regex("a+"))  # not compiled yet
    assert chunks(driver.step()) == [(0, 0, 8)]


# Admission


def test_waiters_are_admitted_in_the_order_of_arrival_while_there_are_rows() -> None:
    driver = Driver(num_pages=60, num_rows=2)
    for uid in (5, 3, 4):
        driver.add(uid, prompt(uid, 2), max_tokens=2)
    assert chunks(driver.step()) == [(5, 0, 2), (3, 0, 2)]
    assert chunks(driver.step()) == []
    assert chunks(driver.step()) == [(4, 0, 2)]


def test_a_request_that_exceeds_the_context_is_refused_once_per_choice() -> None:
    driver = Driver(num_pages=5, page_size=2)
    driver.add(0, prompt(1, 8), max_tokens=3, n=2)
    driver.add(2, [])
    assert set(driver.failures) == {0, 1, 2}
    assert driver.failures[0].startswith("This model's maximum context length is 10 tokens.")
    assert driver.scheduler.num_open == 0


def test_without_max_tokens_the_output_may_fill_the_context() -> None:
    driver = Driver(num_pages=5, page_size=2)
    assert driver.add(0, prompt(0, 8), max_tokens=None).max_tokens == 2
    driver.finish()
    assert driver.ends == {0: Finish.LENGTH}


def test_a_capped_output_ends_with_the_context() -> None:
    driver = Driver(num_pages=5, page_size=2)
    message = generate_msg(0, prompt(0, 8), max_tokens=50)
    driver.scheduler.add_request(replace(message, caps_output=True), 0.0)
    driver.finish()
    assert driver.ends == {0: Finish.LENGTH}
    assert len(driver.tokens[0]) == 2


def test_pages_are_taken_on_demand() -> None:
    driver = Driver(num_pages=60, page_size=4)
    request = driver.add(0, prompt(0, 6), max_tokens=100)
    used = []
    for _ in range(7):
        driver.step()
        assert request.lease is not None
        used.append(len(request.lease.pages))
    assert used == [2, 2, 2, 3, 3, 3, 3]


def test_a_prompt_is_admitted_only_beside_what_running_prompts_still_need() -> None:
    driver = Driver(num_pages=24, page_size=1, budget=8)
    driver.add(0, prompt(0, 20), max_tokens=1)
    driver.step()
    driver.add(1, prompt(1, 4), max_tokens=1)
    # 14 of 24 pages are taken and 6 promised when the second is looked at; it needs 4, and 1 more.
    assert chunks(driver.step()) == [(0, 8, 8)]
    driver.step()
    assert chunks(driver.step()) == [(1, 0, 4)]


def test_admission_leaves_a_page_for_each_running_request() -> None:
    driver = Driver(num_pages=10, page_size=2, radix_cache=False)
    driver.add(0, prompt(0, 2))
    driver.add(1, prompt(1, 2))
    driver.step()
    late = driver.add(2, prompt(2, 9), max_tokens=1)
    driver.step()
    assert late.status is Status.WAITING, (
        "it needs 5 pages and 6 are left, 2 of them for the others"
    )
    driver.abort(0)
    driver.step()
    assert late.status is Status.RUNNING


def test_a_grammar_that_is_being_compiled_holds_up_nobody_else() -> None:
    driver = Driver(num_pages=60)
    constrained = driver.add(0, prompt(0, 2), grammar=Grammar.regex("a+"))
    driver.add(1, prompt(1, 2))
    assert driver.scheduler.num_compiling == 1
    assert chunks(driver.step()) == [(1, 0, 2)]
    assert constrained.bypassed == 0
    driver.scheduler.set_matcher(0, cast(Matcher, object()))
    plan = driver.plan()
    assert plan is not None
    assert chunks(plan) == [(0, 0, 2)]


# Bypasses


def blocked() -> tuple[Driver, Request]:
    """Request 0 holds half of the pages, and request 1 needs more than the other half."""
    driver = Driver(num_pages=20, page_size=1, num_rows=100, budget=32, radix_cache=False)
    driver.add(0, prompt(0, 8), max_tokens=12)
    driver.step()
    return driver, driver.add(1, prompt(1, 12), max_tokens=1)


def test_a_younger_request_that_fits_bypasses_an_older_one_that_does_not() -> None:
    driver, head = blocked()
    driver.add(2, prompt(2, 2), max_tokens=1)
    driver.add(3, prompt(3, 2), max_tokens=1)
    assert chunks(driver.step()) == [(2, 0, 2), (3, 0, 2)]
    assert (head.status, head.bypassed) == (Status.WAITING, 2)
    driver.abort(0)
    driver.step()
    assert (driver.ends[1], head.bypassed) == (Finish.LENGTH, 0)


def test_after_so_many_bypasses_all_wait_for_the_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisrv.scheduler.scheduler.MAX_BYPASSES", 3)
    driver, head = blocked()
    for uid in range(2, 7):
        driver.add(uid, prompt(uid, 1), max_tokens=1)
        driver.step()
    assert sorted(driver.ends) == [2, 3, 4]
    assert head.bypassed == 3
    driver.abort(0)
    assert [uid for uid, *_ in chunks(driver.step())] == [1, 5, 6]


def test_a_step_looks_past_at_most_so_many_requests_that_do_not_fit() -> None:
    driver, _ = blocked()
    for uid in range(2, MAX_BYPASSES + 1):
        driver.add(uid, prompt(1, 12), max_tokens=1)
    driver.add(500, prompt(7, 1), max_tokens=1)
    driver.step()
    assert 500 not in driver.ends
    driver.abort(2)
    driver.step()
    assert 500 in driver.ends


# A long queue


@pytest.fixture
def num_looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often waiting requests are matched, and how often any tokens are compared."""
    calls = Counter[str]()
    for name in ("match_pinned", "_common_pages"):
        method = getattr(RadixTree, name)

        def count(*args: Any, _name: str = name, _method: Any = method, **options: Any) -> Any:
            calls[_name] += 1
            return _method(*args, **options)

        monkeypatch.setattr(RadixTree, name, count)
    return calls


def long_queue() -> tuple[Driver, list[Request]]:
    """Request 0 decodes; it has the pages of a prefix, to which ten others add too much."""
    driver = Driver(num_pages=40, page_size=1, num_rows=20, budget=64)
    driver.scheduler.check = lambda: None  # it looks into the tree
    prefix = [9] * 20
    driver.add(0, [*prefix, 0], max_tokens=15)
    driver.add(20, [7], max_tokens=4)
    driver.step()
    return driver, [driver.add(uid, [*prefix, *prompt(uid, 19)]) for uid in range(1, 11)]


def test_waiting_requests_are_not_matched_again_before_pins_change(
    num_looks: Counter[str],
) -> None:
    driver, waiting = long_queue()
    num_looks.clear()
    driver.step()
    assert num_looks == {"match_pinned": 10, "_common_pages": 10}
    num_looks.clear()
    driver.step()
    driver.scheduler.cache.evict(1)
    driver.step()
    assert not num_looks
    assert 20 in driver.ends, "the end of the last step changes pins"
    driver.step()
    assert num_looks == {"match_pinned": 10}, "none compares the prefix again"
    num_looks.clear()
    driver.step()
    assert not num_looks
    assert all(request.status is Status.WAITING for request in waiting)


def test_without_room_waiting_requests_are_not_looked_at() -> None:
    driver = Driver(num_pages=10, page_size=1, num_rows=20)
    driver.add(0, prompt(0, 8), max_tokens=2)
    driver.step()
    waiting = [driver.add(uid, prompt(uid, 1)) for uid in range(1, 4)]
    driver.step()
    assert all(request.demand is None for request in waiting)
    driver.finish()


def test_a_preempted_request_demands_room_for_its_output_too() -> None:
    driver, requests = three_running()
    driver.step()  # preempts request 2, which has two tokens
    driver.abort(0)
    driver.add(3, prompt(3, 1), max_tokens=1)
    driver.step()
    demand = requests[2].demand
    assert demand is not None
    assert demand.token_ids.tolist() == [2, 2, TOKEN + 1, TOKEN + 2]
    assert demand.num_pages == 4
    driver.finish()
    assert requests[2].demand is None


def test_a_loop_over_the_queue_may_change_it() -> None:
    driver = Driver(num_pages=60, num_rows=1)
    requests = [driver.add(uid, prompt(uid, 1)) for uid in range(6)]
    queue, seen = driver.scheduler.waiting, []
    queue.withdraw(requests[0])
    queue.withdraw(requests[4])
    for request in queue:
        seen.append(request.uid)
        if request.uid == 2:
            queue.withdraw(request)
            queue.withdraw(requests[3])
            queue.enqueue(requests[0])
            queue.enqueue(requests[4])
    assert seen == [1, 2, 4, 5]
    assert [request.uid for request in queue] == [0, 1, 4, 5]


# Preemption


def three_running(num_pages: int = 9) -> tuple[Driver, list[Request]]:
    """Three requests that decode; each needs a page per token, and no page is left."""
    driver = Driver(num_pages=num_pages, page_size=1, radix_cache=False)
    requests = [driver.add(uid, prompt(uid, 2), max_tokens=6) for uid in range(3)]
    driver.step()
    driver.step()
    assert driver.scheduler.cache.num_available == num_pages - 9
    return driver, requests


def test_the_newest_request_is_preempted_first() -> None:
    driver, requests = three_running()
    assert decodes(driver.step()) == [0, 1]
    running, waiting = Status.RUNNING, Status.WAITING
    assert [request.status for request in requests] == [running, running, waiting]
    assert driver.scheduler.num_preemptions == 1
    driver.step()
    driver.step()
    assert [request.status for request in requests] == [running, waiting, waiting]


def test_a_preempted_request_keeps_its_output_and_its_place_and_continues() -> None:
    driver, requests = three_running()
    preempted = requests[2]
    before = list(preempted.output_ids)
    later = driver.add(3, prompt(3, 2), max_tokens=1)
    driver.step()
    assert preempted.lease is None
    assert preempted.output_ids == before == driver.tokens[2]
    assert list(driver.scheduler.waiting) == [preempted, later]
    while preempted.status is Status.WAITING:
        plan = driver.step()
    assert plan.prefills[0].request is preempted
    assert preempted.prefill_ids.tolist() == [2, 2, *before]
    driver.finish()
    assert [len(driver.tokens[uid]) for uid in range(4)] == [6, 6, 6, 1]
    assert driver.tokens[2][: len(before)] == before


def test_what_a_preempted_request_computed_is_not_counted_as_cached_when_it_continues() -> None:
    driver = Driver(num_pages=7, page_size=1)
    driver.add(0, prompt(0, 1), max_tokens=6)
    request = driver.add(1, prompt(1, 2), max_tokens=2)
    driver.step()
    driver.scheduler._preempt(request, now=0.0)
    plan = driver.step()
    assert chunks(plan) == [(1, 2, 1)], "its prompt is still in the cache"
    assert request.cached_tokens == 0


def test_a_request_that_is_newest_preempts_nobody() -> None:
    driver, _ = three_running(num_pages=11)
    assert decodes(driver.step()) == [0, 1]
    assert driver.scheduler.num_preemptions == 0


def test_a_request_that_is_in_the_step_is_not_preempted_by_a_chunk() -> None:
    driver = Driver(num_pages=15, page_size=1, budget=4, radix_cache=False)
    driver.add(0, prompt(0, 13), max_tokens=1)
    newer = driver.add(1, prompt(1, 1), max_tokens=8)
    steps = [(decodes(plan), chunks(plan)) for plan in (driver.step() for _ in range(4))]
    assert steps[0] == ([], [(0, 0, 3), (1, 0, 1)])
    assert steps[3] == ([1], []), "the newer one took the last page"
    assert newer.status is Status.RUNNING
    plan = driver.step()
    assert (decodes(plan), chunks(plan)) == ([], [(0, 11, 2)])
    assert newer.status is Status.WAITING


def test_nobody_is_admitted_in_a_step_that_had_to_preempt() -> None:
    driver = Driver(num_pages=14, page_size=1, budget=16, radix_cache=False)
    driver.add(0, prompt(0, 2))
    victim = driver.add(1, prompt(1, 10))
    driver.step()
    driver.step()
    waiter = driver.add(2, prompt(2, 1), max_tokens=1)
    plan = driver.step()
    assert plan.has_preempted
    assert (decodes(plan), chunks(plan)) == ([0], [])
    assert driver.scheduler.cache.num_available == 10
    assert chunks(driver.step()) == [(2, 0, 1)]
    assert victim.status is Status.WAITING
    assert waiter.status is Status.FINISHED


def test_a_preempted_request_is_not_admitted_before_its_token_in_flight_is_settled() -> None:
    driver = Driver(num_pages=20, page_size=1)
    request = driver.add(0, prompt(0, 2))
    in_flight = driver.plan()
    assert in_flight is not None
    driver.scheduler._preempt(request, now=0.0)
    assert driver.plan() is None
    driver.settle(in_flight)
    plan = driver.step()
    assert plan.prefills[0].request is request
    assert request.prefill_ids.tolist() == [0, 0, TOKEN + 1]
    assert driver.tokens[0] == [TOKEN + 1, TOKEN + 2]


# Abort, and pages that a step in flight still uses


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_an_abort_while_waiting_prefilling_or_decoding_ends_a_request_once(num_steps: int) -> None:
    driver = Driver(num_pages=20, page_size=2, budget=4)
    request = driver.add(0, prompt(0, 6))
    for _ in range(num_steps):
        driver.step()
    driver.abort(0, 12345)
    driver.abort(0)
    assert driver.ends == {0: Finish.ABORT}
    assert request.status is Status.FINISHED
    assert driver.plan() is None
    driver.finish()


def test_an_abort_drops_the_token_in_flight() -> None:
    driver = Driver(num_pages=20)
    request = driver.add(0, prompt(0, 2))
    driver.add(1, prompt(1, 2))
    plan = driver.plan()
    assert plan is not None
    driver.abort(0)
    assert driver.settle(plan).num_tokens == 1
    assert request.output_ids == []
    assert list(driver.tokens) == [1]


def test_a_preempted_request_can_be_aborted() -> None:
    driver, requests = three_running()
    driver.step()
    assert requests[2].status is Status.WAITING
    driver.abort(2)
    assert driver.ends == {2: Finish.ABORT}
    driver.finish()


def test_pages_of_a_step_in_flight_come_back_when_it_settles_and_nobody_is_preempted() -> None:
    driver = Driver(num_pages=9, page_size=1, radix_cache=False)
    for uid in range(3):
        driver.add(uid, prompt(uid, 2), max_tokens=6)
    driver.step()
    in_flight = driver.plan()
    assert in_flight is not None
    driver.abort(2)
    cache = driver.scheduler.cache
    assert (cache.num_available, cache.num_returning) == (0, 3)
    assert driver.plan() is None, "the two that are left wait for the pages of the third"
    driver.settle(in_flight)
    assert cache.num_available == 3
    assert decodes(driver.step()) == [0, 1]
    assert driver.scheduler.num_preemptions == 0


# Sharing


def test_of_two_that_arrive_together_the_second_waits_for_the_pages_of_the_first() -> None:
    driver = Driver(num_pages=60, page_size=4, budget=64)
    driver.add(0, [9] * 8 + [1])
    second = driver.add(1, [9] * 8 + [2])
    assert chunks(driver.step()) == [(0, 0, 9)]
    assert second.status is Status.WAITING
    assert chunks(driver.step()) == [(1, 8, 1)]
    assert driver.starts[1].cached_tokens == 8


def test_two_that_arrive_together_with_different_salts_share_nothing() -> None:
    driver = Driver(num_pages=60, page_size=4, budget=64)
    driver.add(0, [9] * 9)
    driver.add(1, [9] * 9, "another salt")
    assert chunks(driver.step()) == [(0, 0, 9), (1, 0, 9)]


def test_a_prompt_that_continues_a_finished_one_begins_after_its_pages() -> None:
    driver = Driver(num_pages=60, page_size=4, budget=64)
    driver.add(0, [9] * 9, max_tokens=1)
    driver.step()
    driver.add(1, [9] * 12)
    driver.add(2, [9] * 12, "another salt")
    assert chunks(driver.step()) == [(1, 8, 4), (2, 0, 12)]


def test_a_prompt_whose_logprobs_are_wanted_is_computed_whole() -> None:
    driver = Driver(num_pages=60, page_size=4, budget=64)
    driver.add(0, [9] * 9, max_tokens=1)
    driver.step()
    driver.add(1, [9] * 9, prompt_logprobs=1)
    plan = driver.plan()
    assert plan is not None
    assert chunks(plan) == [(1, 0, 9)]
    assert plan.scored == plan.prefills


# What settle returns, and times


def test_settle_counts_tokens_that_were_appended_and_those_of_decodes() -> None:
    driver = Driver(num_pages=60, num_rows=5, budget=32)
    for uid in range(3):
        driver.add(uid, prompt(uid, 2), max_tokens=2)
    plan = driver.plan()
    assert plan is not None
    assert driver.settle(plan) == StepOutcome(3, 0, [])
    driver.add(3, prompt(3, 2), max_tokens=0, prompt_logprobs=0)
    driver.add(4, prompt(4, 2), max_tokens=2)
    plan = driver.plan()
    assert plan is not None
    assert [request.uid for request in plan.samples] == [0, 1, 2, 3, 4]
    driver.abort(1)
    assert driver.settle(plan) == StepOutcome(num_tokens=3, num_decoded=2, resumed_after_s=[])
    assert driver.tokens[3] == []


def test_settle_returns_how_long_a_preempted_request_has_waited() -> None:
    driver, _ = three_running()
    driver.now = 10.0
    driver.step()
    driver.now = 17.0
    driver.abort(0, 1)
    plan = driver.plan()
    assert plan is not None
    assert chunks(plan) == [(2, 0, 4)]
    driver.now = 18.0
    assert driver.settle(plan) == StepOutcome(num_tokens=1, num_decoded=0, resumed_after_s=[8.0])


def test_a_start_has_the_time_to_the_first_admission_and_from_there_to_the_first_token() -> None:
    driver = Driver(num_pages=20, num_rows=1)
    driver.now = 100.0
    driver.add(0, prompt(0, 1), max_tokens=2)
    driver.add(1, prompt(1, 1), max_tokens=1)
    for driver.now in (101.0, 103.0):
        driver.step()
    driver.now = 107.0
    plan = driver.plan()
    assert plan is not None
    driver.now = 109.0
    driver.settle(plan)
    times = [(start.queue_s, start.prefill_s, start.at) for start in driver.starts.values()]
    assert times == [(1.0, 0.0, 101.0), (7.0, 2.0, 109.0)]


def test_a_request_preempted_before_its_first_token_was_queued_until_its_first_admission() -> None:
    driver = Driver(num_pages=20, budget=4)
    request = driver.add(0, prompt(0, 8))
    driver.now = 1.0
    driver.step()
    driver.scheduler._preempt(request, now=2.0)
    driver.now = 5.0
    driver.step()
    start = driver.starts[0]
    assert (start.queue_s, start.prefill_s) == (1.0, 4.0)


# The status


def test_each_change_of_status_in_the_table_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    become = Request.become

    def watch(request: Request, status: Status) -> None:
        seen.add((request.status, status))
        become(request, status)

    monkeypatch.setattr(Request, "become", watch)
    driver, _ = three_running()
    driver.step()  # preempts 2
    driver.abort(2)
    driver.finish()
    assert seen == {(old, new) for old, allowed in _MAY_BECOME.items() for new in allowed}


@pytest.mark.parametrize(
    ("old", "new"), [(a, b) for a, b in product(Status, Status) if b not in _MAY_BECOME[a]]
)
def test_any_other_change_of_status_is_an_assertion_that_shows_the_request(
    old: Status, new: Status
) -> None:
    request = Driver().add(0, prompt(0, 3))
    request.status = old
    with pytest.raises(
        AssertionError, match=rf"<Request 0 {old.value}, .* cannot become {new.value}"
    ):
        request.become(new)


def test_a_debugger_shows_a_plan_and_a_request_in_a_line() -> None:
    driver = Driver(num_pages=60, page_size=4)
    request = driver.add(0, prompt(0, 6))
    driver.step()
    driver.add(1, prompt(1, 3))
    plan = driver.plan()
    assert repr(plan) == "<StepPlan 2 decodes [0] prefills [1[0:3]]>"
    assert repr(request) == (
        "<Request 0 running, arrival 1, prompt 6, output 1/234, computed 7, in flight 1, "
        "pages [0, 1]>"
    )
