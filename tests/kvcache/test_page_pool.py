"""Ids come back once, and only when their step has settled."""

import pytest

from minisrv.kvcache.page_pool import IdPool


def test_every_id_is_given_once() -> None:
    pool = IdPool(5)
    assert sorted(pool.allocate(2) + pool.allocate(3)) == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError):
        pool.allocate(1)


def test_an_id_in_use_by_a_step_is_free_when_the_step_has_settled() -> None:
    pool = IdPool(2)
    ids = pool.allocate(2)
    pool.release(ids[:1], last_step=4)
    pool.release(ids[1:], last_step=5)
    assert (pool.num_free, pool.num_quarantined) == (0, 2)
    pool.settle(4)
    assert (pool.num_free, pool.num_quarantined) == (1, 1)
    pool.settle(5)
    assert sorted(pool.allocate(2)) == [0, 1]


def test_an_id_whose_step_has_settled_is_free_at_once() -> None:
    pool = IdPool(1)
    pool.settle(3)
    pool.release(pool.allocate(1), last_step=3)
    assert pool.num_free == 1


def test_idle_ids_are_those_that_nobody_holds() -> None:
    pool = IdPool(4)
    held = pool.allocate(2)
    pool.release(held[:1], last_step=9)
    assert sorted(pool.idle_ids()) == sorted({0, 1, 2, 3} - {held[1]})
