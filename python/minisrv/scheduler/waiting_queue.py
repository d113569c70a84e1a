"""Requests without a row, oldest first; a preempted one returns to its old place."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from minisrv.scheduler.request import Request


class WaitingQueue:
    """Sorted by arrival. Iteration goes over a copy, so that the queue may change meanwhile."""

    def __init__(self) -> None:
        self._arrivals: list[int] = []
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests[:])

    def add(self, request: Request) -> None:
        """Put a request at its place by arrival."""
        index = bisect_left(self._arrivals, request.arrival)
        self._arrivals.insert(index, request.arrival)
        self._requests.insert(index, request)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        index = bisect_left(self._arrivals, request.arrival)
        assert self._requests[index] is request, "a request that is not waiting was removed"
        del self._arrivals[index], self._requests[index]
