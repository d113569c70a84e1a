"""The requests that wait, one queue per API key; a preempted one returns to its old place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from minisrv.scheduler.request import Request


class KeyQueue:
    """Sorted by arrival. A loop over it may change it; the next request is the next by arrival."""

    def __init__(self) -> None:
        self._arrivals: list[int] = []
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        index = 0
        while index < len(self._requests):
            request = self._requests[index]
            yield request
            index = bisect_right(self._arrivals, request.arrival)

    def enqueue(self, request: Request) -> None:
        index = bisect_left(self._arrivals, request.arrival)
        self._arrivals.insert(index, request.arrival)
        self._requests.insert(index, request)

    def withdraw(self, request: Request) -> None:
        index = bisect_left(self._arrivals, request.arrival)
        assert self._requests[index] is request, f"{request!r} is not in the waiting queue"
        del self._arrivals[index], self._requests[index]


class WaitingQueue:
    """All queues. Without fair shares every request has the key 0: there is one queue."""

    def __init__(self) -> None:
        self._queues: dict[int, KeyQueue] = {0: KeyQueue()}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        """All requests, queue by queue."""
        for queue in self._queues.values():
            yield from queue

    def by_key(self) -> dict[int, KeyQueue]:
        """The queues in which requests wait."""
        return {key: queue for key, queue in self._queues.items() if queue}

    def of(self, key: int) -> KeyQueue:
        """The queue of a key."""
        return self._queues.setdefault(key, KeyQueue())

    def enqueue(self, request: Request) -> None:
        self.of(request.key).enqueue(request)

    def withdraw(self, request: Request) -> None:
        self.of(request.key).withdraw(request)


def next_prompt_need(prefilling: Iterable[Request], queue: KeyQueue, first: Request) -> int:
    """Tokens that the next request after `first` has to prefill: a running one or a waiter."""
    for request in prefilling:
        if request is not first and request.lease is not None and request.prefilling:
            return len(request.prefill_ids) - request.num_computed
    head = next(iter(queue), None)
    return 0 if head is None else len(head.prefill_ids)
