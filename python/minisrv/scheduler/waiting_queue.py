"""The requests that wait, oldest first; a preempted one returns to its old place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from minisrv.scheduler.request import Request


class WaitingQueue:
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
