"""Leases: what they share, what they own, and what the page table is told."""

import numpy as np

from minisrv.kvcache.manager import KVCacheManager, Lease

TOKENS = np.arange(10, dtype=np.int32)


def computed_lease(cache: KVCacheManager, step: int, count: int = 10) -> Lease:
    lease = cache.open_lease()
    assert cache.grow(lease, count) == count
    lease.last_step = step
    cache.share(lease, TOKENS, count, step)
    return lease


def test_full_pages_go_to_the_tree_and_the_rest_stays_private() -> None:
    cache = KVCacheManager(8, 2, 4, radix_cache=True)
    lease = computed_lease(cache, 1)
    assert (lease.num_shared, len(lease.pages)) == (2, 3)
    cache.check([lease])
    assert cache.take_page_writes() == {(lease.row, c): p for c, p in enumerate(lease.pages)}
    assert cache.take_page_writes() == {}


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = KVCacheManager(8, 2, 5, radix_cache=True)
    first = computed_lease(cache, 1)
    second = cache.open_lease()
    assert cache.extend_match(second, TOKENS, 0, 2) == 5
    assert second.pages == first.pages[:1]
    cache.check([first, second])


def test_a_page_begun_alone_is_replaced_by_the_ready_one_in_the_row() -> None:
    cache = KVCacheManager(8, 2, 4, radix_cache=True)
    slow = cache.open_lease()
    cache.grow(slow, 2)
    own = slow.pages[0]
    slow.last_step = 1
    fast = computed_lease(cache, 1)
    assert cache.extend_match(slow, TOKENS, 2, 1) is None
    cache.take_page_writes()
    assert cache.extend_match(slow, TOKENS, 2, 2) == 8
    assert cache.take_page_writes() == {(slow.row, 0): fast.pages[0], (slow.row, 1): fast.pages[1]}
    cache.check([slow, fast])
    assert own in cache.pages.idle_ids()
    assert cache.num_returning == 1
    cache.settle(1)
    assert cache.num_returning == 0


def test_a_closed_lease_leaves_its_full_pages_and_gives_back_duplicates() -> None:
    cache = KVCacheManager(8, 2, 4, radix_cache=True)
    first = cache.open_lease()
    cache.grow(first, 10)
    second = cache.open_lease()
    cache.grow(second, 10)
    cache.close_lease(first, TOKENS, 9)
    cache.close_lease(second, TOKENS, 9)
    cache.check([])
    assert cache.tree.num_pages == 2
    assert cache.pages.num_free == 6


def test_a_lease_that_outgrows_the_pool_gets_what_there_is() -> None:
    cache = KVCacheManager(3, 2, 4, radix_cache=True)
    old = computed_lease(cache, 1, 8)
    cache.settle(1)
    cache.close_lease(old, TOKENS, 8)
    lease = cache.open_lease()
    assert cache.grow(lease, 100) == 12
    assert cache.tree.num_pages == 0
    cache.check([lease])


def test_evicted_pages_wait_for_the_last_step_that_reads_them() -> None:
    cache = KVCacheManager(2, 2, 4, radix_cache=True)
    cache.close_lease(computed_lease(cache, 7, 8), TOKENS, 8)
    lease = cache.open_lease()
    assert cache.grow(lease, 4) == 0
    assert cache.num_returning == 1
    cache.settle(7)
    assert cache.grow(lease, 4) == 4
    cache.check([lease])


def test_what_a_closed_lease_had_to_write_is_not_written_into_the_row_of_the_next() -> None:
    cache = KVCacheManager(num_pages=8, num_rows=1, page_size=2, radix_cache=True)
    lease = cache.open_lease()
    cache.grow(lease, 7)
    cache.close_lease(lease, np.arange(7, dtype=np.int32), 7)
    cached = cache.open_lease()
    assert cache.extend_match(cached, np.arange(7, dtype=np.int32), 0, 1) == 6
    cache.close_lease(cached, np.arange(7, dtype=np.int32), 6)
    after = cache.open_lease()
    assert after.row == cached.row
    cache.grow(after, 1)
    assert cache.take_page_writes() == {(after.row, 0): after.pages[0]}


def test_without_the_radix_cache_nothing_is_kept() -> None:
    cache = KVCacheManager(4, 2, 4, radix_cache=False)
    lease = computed_lease(cache, 1)
    assert lease.num_shared == 0
    cache.settle(1)
    cache.close_lease(lease, TOKENS, 10)
    assert cache.pages.num_free == 4
    second = cache.open_lease()
    assert cache.extend_match(second, TOKENS, 0, 2) == 0
