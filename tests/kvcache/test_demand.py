"""A remembered demand is always that of a full match, without comparing all tokens again."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from minisrv.kvcache.manager import Demand, KVCacheManager, Lease
from minisrv.kvcache.radix_tree import RadixTree
from minisrv.wire.arrays import Int32Array

SALTS = (b"", b"a")


def counted_anew(cache: KVCacheManager, demand: Demand, step: int) -> tuple[int, bool]:
    """The oracle: pages to allocate plus cached ones that could be evicted, and Match.pending."""
    tree = cache.tree
    found = tree.match(tree.root, demand.token_ids, demand.limit, step, demand.salt)
    pages = cache.pages_for(len(demand.token_ids)) - found.end
    for node in tree.path(found.node):
        if not node.refs:
            pages += min(found.end, node.end) - node.start
    return pages, found.pending


class Users:
    """Leases that begin, grow and end at random, in steps, with pages evicted in between."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        page_size, num_pages = self.random.choice([1, 2, 3]), self.random.randint(6, 40)
        self.cache = KVCacheManager(num_pages, 6, page_size, radix_cache=True)
        self.leases: list[tuple[Lease, Int32Array]] = []
        self.computed: dict[int, int] = {}
        self.step = 1

    def tokens(self) -> Int32Array:
        stem = self.random.choice([[], [1] * 9, [1, 1] + [0] * 20])
        tail = [self.random.randint(0, 1) for _ in range(self.random.randint(1, 6))]
        return np.array(stem[: self.random.randint(0, len(stem))] + tail, np.int32)

    def act(self) -> None:
        action = self.random.choice([self.begin, self.compute, self.compute, self.end, self.evict])
        action()
        if self.random.random() < 0.3:
            self.cache.settle(self.step)
            self.step += 1
        self.cache.check([lease for lease, _ in self.leases])

    def begin(self) -> None:
        if self.cache.rows.num_free:
            lease = self.cache.open_lease(self.random.choice(SALTS))
            self.leases.append((lease, self.tokens()))
            self.computed[id(lease)] = 0

    def compute(self) -> None:
        """Prefill a chunk, as the scheduler does."""
        if not self.leases:
            return
        lease, ids = self.random.choice(self.leases)
        computed = self.cache.extend_match(lease, ids, self.computed[id(lease)], self.step)
        if computed is None:
            return
        end = self.random.randint(computed, len(ids))
        end = max(computed, self.cache.grow(lease, end))
        lease.last_step, self.computed[id(lease)] = self.step, end
        self.cache.share(lease, ids, end, self.step)

    def end(self) -> None:
        """Close a lease that the step under construction does not use."""
        idle = [user for user in self.leases if user[0].last_step < self.step]
        if idle:
            lease, ids = user = self.random.choice(idle)
            self.leases.remove(user)
            self.cache.close_lease(lease, ids, self.computed.pop(id(lease)))

    def evict(self) -> None:
        self.cache.evict(self.random.randint(1, 8))


@pytest.mark.parametrize("seed", range(60))
def test_a_remembered_demand_equals_that_of_a_full_match(seed: int) -> None:
    users = Users(seed)
    cache, random = users.cache, users.random
    demands = [
        cache.open_demand(users.tokens(), random.choice(SALTS), uses_cache=random.random() < 0.9)
        for _ in range(12)
    ]
    for _ in range(250):
        users.act()
        for demand in random.sample(demands, random.randint(0, len(demands))):
            cache.update_demand(demand, users.step)
            known = demand.num_pages, demand.pinned.pending
            assert known == counted_anew(cache, demand, users.step)
            assert demand.num_pages >= 1


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each edge that is compared with tokens, how many pages have been found before it."""
    calls: list[int] = []
    compare = RadixTree._common_pages

    def watch(tree: RadixTree, child: object, tokens: Int32Array, start: int, limit: int) -> int:
        calls.append(start)
        return compare(tree, child, tokens, start, limit)

    monkeypatch.setattr(RadixTree, "_common_pages", watch)
    return calls


def test_tokens_are_compared_only_beyond_what_was_found_before(compared: list[int]) -> None:
    cache, ids = KVCacheManager(20, 4, 1, radix_cache=True), np.arange(9, dtype=np.int32)
    first = cache.open_lease()
    cache.grow(first, 9)
    demand = cache.open_demand(ids)
    found = []
    for step, computed in enumerate((2, 5, 8), 1):
        first.last_step = step
        cache.share(first, ids, computed, step)
        compared.clear()
        cache.update_demand(demand, step)
        assert demand.pinned.pending
        cache.update_demand(demand, step + 1)
        assert (demand.num_pages, demand.pinned.pending) == (9 - computed, False)
        found.append(compared[:])
    assert found == [[0], [2], [5]]


def test_without_the_cache_a_demand_is_the_whole_prompt() -> None:
    ids = np.arange(9, dtype=np.int32)
    for radix_cache in (True, False):
        cache = KVCacheManager(20, 4, 2, radix_cache=radix_cache)
        lease = cache.open_lease()
        cache.grow(lease, 9)
        cache.share(lease, ids, 9, 1)
        demand = cache.open_demand(ids, uses_cache=not radix_cache)
        cache.update_demand(demand, 2)
        assert demand.num_pages == 5


def test_a_demand_that_is_out_of_date_is_found_by_the_check() -> None:
    cache, ids = KVCacheManager(20, 4, 1, radix_cache=True), np.arange(9, dtype=np.int32)
    demand = cache.open_demand(ids)
    cache.update_demand(demand, 1)
    cache.check_demand(demand, 1)
    lease = cache.open_lease()
    cache.grow(lease, 9)
    cache.share(lease, ids, 9, 1)
    cache.check_demand(demand, 2)
    demand.num_pin_changes = cache.tree.num_pin_changes
    with pytest.raises(AssertionError, match="out of date"):
        cache.check_demand(demand, 2)
