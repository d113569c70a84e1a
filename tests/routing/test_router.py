"""Routers: who gets a prompt, and what they remember of those before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.routing.prefix_index import PrefixIndex, hash_blocks
from minisrv.routing.router import CostRouter, PowerOfTwo, Prompt, ReplicaLoad, RoundRobin

IDLE = ReplicaLoad(queued_tokens=0, open_requests=0, prefill_rate=1000.0)


def prompt(*blocks: int) -> Prompt:
    return Prompt(blocks, 100 * len(blocks), 100)


def queue(tokens: int, rate: float = 1000.0) -> ReplicaLoad:
    return ReplicaLoad(tokens, 1, rate)


def test_numbers_of_blocks_are_equal_exactly_for_equal_beginnings() -> None:
    ids = np.arange(100, dtype=np.int32)
    other = ids.copy()
    other[50] = 7
    ours, theirs = hash_blocks(ids, 16), hash_blocks(other, 16)
    assert len(ours) == len(set(ours)) == 7
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True] * 3 + [False] * 4
    assert hash_blocks(ids[:90], 16)[:5] == ours[:5]
    assert hash_blocks(ids[:90], 16)[5] != ours[5], "a part is not the whole block"
    assert not set(ours) & set(hash_blocks(ids, 16, key=b"secret"))
    assert hash_blocks(ids[:0], 16) == []


def test_round_robin_takes_turns_among_those_that_are_ready() -> None:
    router = RoundRobin()
    ready = {0: IDLE, 2: IDLE, 5: IDLE}
    assert [router.choose(prompt(1), ready, 0.0) for _ in range(4)] == [0, 2, 5, 0]


def test_power_of_two_never_takes_the_fullest_and_reaches_all_others() -> None:
    router = PowerOfTwo()
    loads = {0: queue(900), 1: queue(10), 2: queue(10), 3: IDLE}
    chosen = Counter(router.choose(prompt(1), loads, 0.0) for _ in range(300))
    assert chosen.keys() == {1, 2, 3}
    assert chosen[3] > chosen[1]
    assert router.choose(prompt(1), {4: queue(9)}, 0.0) == 4


def test_the_cost_router_weighs_what_is_cached_against_what_is_queued() -> None:
    router = CostRouter(PrefixIndex(100))
    router.record(1, prompt(1, 2, 3, 4), 0.0)
    follow_up = prompt(1, 2, 3, 4, 5)
    assert router.choose(follow_up, {0: IDLE, 1: queue(399)}, 0.0) == 1
    assert router.choose(follow_up, {0: IDLE, 1: queue(401)}, 0.0) == 0
    assert router.choose(follow_up, {0: IDLE, 1: queue(301, rate=500.0)}, 0.0) == 0
    assert router.wait_s(1, follow_up, queue(50)) == pytest.approx(0.15)
    assert router.wait_s(1, prompt(1, 2), IDLE) == pytest.approx(0.001), "one token is computed"
    router.forget(1)
    assert router.choose(follow_up, {0: IDLE, 1: queue(1)}, 0.0) == 0
    assert router.choose(prompt(), {3: IDLE}, 0.0) == 3


def test_the_session_decides_among_equal_waits_only() -> None:
    router = CostRouter(PrefixIndex(100))
    of_session = Prompt((1, 2), 200, 100, "talk")
    router.record(2, of_session, 0.0)
    idle = dict.fromkeys(range(4), IDLE)
    other = Prompt((7, 8), 200, 100, "talk")
    assert router.choose(other, idle, 0.0) == 2
    assert router.choose(Prompt((7, 8), 200, 100), idle, 0.0) == 0
    assert router.choose(other, {**idle, 2: queue(1)}, 0.0) == 0
    router.record(3, Prompt((7,), 100, 100), 0.0)
    assert router.choose(other, idle, 0.0) == 3, "what is cached there counts more"
    router.forget(2)
    router.record(1, other, 0.0)
    assert router.choose(Prompt((9,), 100, 100, "talk"), idle, 0.0) == 1, "the last one"


def test_new_prompts_spread_over_idle_replicas() -> None:
    router, loads, chosen = (
        CostRouter(PrefixIndex(100)),
        dict.fromkeys(range(3), IDLE),
        Counter[int](),
    )
    for number in range(30):
        replica = router.choose(prompt(number), loads, 0.0)
        router.record(replica, prompt(number), 0.0)
        chosen[replica] += 1
    assert chosen == {0: 10, 1: 10, 2: 10}


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=5, unique=True), max_size=30), st.integers(1, 9)
)
def test_the_index_keeps_the_last_blocks_and_drops_ends_first(
    prompts: list[list[int]], capacity: int
) -> None:
    """Against a plain list of uses, oldest first."""
    index, uses = PrefixIndex(capacity), list[int]()
    for blocks in prompts:
        index.add(0, blocks)
        uses += reversed(blocks)
    kept = list(dict.fromkeys(reversed(uses)))[:capacity]
    assert index.num_blocks(0) == len(kept)
    for block in range(13):
        assert index.num_matching(0, [block]) == (block in kept)
        assert index.num_matching(1, [block]) == 0
    index.remove(0, kept)
    assert index.num_blocks(0) == 0
