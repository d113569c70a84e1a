"""What must hold of the scheduler's requests between any two of its calls."""

from __future__ import annotations

from collections.abc import Iterable

from minisrv.kvcache.manager import KVCacheManager
from minisrv.scheduler.request import Request, Status
from minisrv.scheduler.waiting_queue import WaitingQueue


def check_requests(
    requests: Iterable[Request],
    running: list[Request],
    waiting: WaitingQueue,
    cache: KVCacheManager,
    next_step: int,
) -> None:
    """Assert that all `requests` run or wait, and that their leases and pages agree."""
    running_ids = {id(request) for request in running}
    waiting_ids = {id(request) for request in waiting}
    assert running_ids.isdisjoint(waiting_ids)
    assert running_ids | waiting_ids == {id(request) for request in requests}
    leases = []
    for request in running:
        assert request.status is Status.RUNNING
        assert request.lease is not None
        assert len(request.lease.pages) >= cache.pages_for(request.num_computed)
        leases.append(request.lease)
    for request in waiting:
        assert request.status is Status.WAITING
        assert request.lease is None
        if request.demand is not None:
            cache.check_demand(request.demand, next_step)
    assert [r.arrival for r in running] == sorted(r.arrival for r in running)
    cache.check(leases)
