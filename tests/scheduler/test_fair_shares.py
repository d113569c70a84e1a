"""Equal shares of the prompt tokens between API keys, and what a crowd costs the others."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.scheduler.fair_shares import FairShares
from tests.scheduler.test_scheduler import Driver, chunks, prompt

WANTED = st.dictionaries(st.integers(0, 5), st.integers(1, 40), min_size=1)


@given(steps=st.lists(st.tuples(WANTED, st.integers(1, 30)), min_size=1, max_size=20))
def test_the_whole_budget_is_shared_and_nobody_gets_more_than_it_wants(
    steps: list[tuple[dict[int, int], int]],
) -> None:
    shares = FairShares()
    for wanted, budget in steps:
        divided = shares.divide(wanted, budget)
        assert divided.keys() == wanted.keys()
        assert all(0 <= divided[key] <= wanted[key] for key in wanted)
        assert sum(divided.values()) == min(budget, sum(wanted.values()))


@given(num_keys=st.integers(1, 7), budget=st.integers(1, 50), num_steps=st.integers(1, 60))
def test_keys_that_always_want_more_get_the_same(
    num_keys: int, budget: int, num_steps: int
) -> None:
    shares, totals = FairShares(), dict.fromkeys(range(num_keys), 0)
    for _ in range(num_steps):
        for key, tokens in shares.divide(dict.fromkeys(range(num_keys), 10**6), budget).items():
            totals[key] += tokens
    quantum = max(1, budget // num_keys)
    assert max(totals.values()) - min(totals.values()) <= 2 * quantum


def test_what_one_key_does_not_want_is_for_the_others() -> None:
    shares = FairShares()
    divided = [shares.divide({1: 100, 2: 3, 3: 100}, 30) for _ in range(10)]
    assert [step[2] for step in divided] == [3] * 10
    assert all(min(step[1], step[3]) >= 10 for step in divided)
    assert abs(sum(step[1] for step in divided) - sum(step[3] for step in divided)) <= 20
    assert shares.divide({1: 100}, 30) == {1: 30}


def test_a_key_that_was_away_has_no_credit_from_before() -> None:
    shares = FairShares()
    for _ in range(10):
        shares.divide({1: 100}, 8)
    assert shares.divide({1: 100, 2: 100}, 8) == {1: 4, 2: 4}


MOST_STEPS = 25


def steps_to_first_token(length: int, *, crowd: int, fair: bool, long: bool) -> int | None:
    """Steps until key 2's single request, which comes a step later, has its first token.

    None if it has none after MOST_STEPS.
    """
    driver = Driver(num_pages=8000, page_size=4, num_rows=128, budget=64, fair_keys=fair)
    for uid in range(crowd):
        driver.add(uid, prompt(uid + 1, 2000 if long else 64), key=1, max_tokens=1)
    if crowd:
        driver.step()
    driver.add(999, prompt(999, length), key=2, max_tokens=1)
    for count in range(1, MOST_STEPS + 1):
        driver.step()
        if 999 in driver.starts:
            return count
    return None


@pytest.mark.parametrize(
    ("long", "length"),
    [
        *((False, 1), (False, 300), (True, 32)),
        *(
            pytest.param(*rest, marks=pytest.mark.soak)
            for rest in ((False, 32), (True, 1), (True, 300))
        ),
    ],
)
def test_a_crowd_of_one_key_costs_another_keys_request_at_most_a_step(
    length: int, long: bool
) -> None:
    """Beside a hundred waiting requests it has half of each step, and waits for no turn."""
    with_its_share = math.ceil(length / 32)
    needed = steps_to_first_token(length, crowd=100, fair=True, long=long)
    assert needed is not None
    assert needed <= with_its_share + 1
    assert steps_to_first_token(length, crowd=0, fair=True, long=long) == math.ceil(length / 64)
    assert steps_to_first_token(length, crowd=100, fair=False, long=long) is None


def test_a_free_row_goes_to_the_key_whose_turn_it_is() -> None:
    driver = Driver(num_pages=100, num_rows=1, budget=64, fair_keys=True)
    for uid in range(4):
        driver.add(uid, prompt(uid + 1, 4), key=1, max_tokens=1)
    driver.add(10, prompt(10, 4), key=2, max_tokens=1)
    order = [chunks(driver.step())[0][0] for _ in range(5)]
    assert sorted(order) == [0, 1, 2, 3, 10]
    assert order.index(10) <= 1


def test_a_key_whose_request_does_not_fit_is_not_passed_by_for_ever() -> None:
    driver = Driver(num_pages=64, page_size=1, num_rows=64, budget=64, fair_keys=True)
    driver.add(0, prompt(1, 10), key=1, max_tokens=40)
    driver.step()
    driver.add(1, prompt(2, 50), key=2, max_tokens=1)
    for uid in range(2, 200):
        driver.add(uid, prompt(uid + 1, 2), key=1, max_tokens=3)
    for _ in range(200):
        if 1 not in driver.starts:
            driver.step()
    assert 1 in driver.starts
    driver.finish()


def test_without_fair_keys_the_key_changes_nothing() -> None:
    plans = []
    for num_keys in (1, 3):
        driver = Driver(num_pages=400, num_rows=64, budget=64)
        for uid in range(6):
            driver.add(uid, prompt(uid + 1, 50), key=uid % num_keys, max_tokens=1)
        plans.append([chunks(driver.step()) for _ in range(5)])
    assert plans[0] == plans[1]
