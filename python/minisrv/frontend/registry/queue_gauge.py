"""How many requests wait for their first step, and how long that takes. No clock of its own."""

from __future__ import annotations

import math
from collections import deque

from minisrv.errors import OverloadedError
from minisrv.wire.messages import StatsMsg

WINDOW_S = 30.0
MIN_ADMITTED = 16
MAX_RETRY_S = 3600


class QueueGauge:
    """The scheduler's last figures, brought up to date by what the frontend itself knows.

    The rate counts requests that got their first step while others waited, over the last WINDOW_S
    of such time, or longer until they are MIN_ADMITTED.
    """

    def __init__(self, max_running: int) -> None:
        """max_running: requests that the scheduler may run at once."""
        self._max_running = max_running
        self._stats: StatsMsg | None = None
        self._taken_at = 0.0
        self._unstarted = 0
        self._busy: deque[tuple[float, int]] = deque()  # seconds, admitted requests
        self._seconds, self._admitted = 0.0, 0

    def take(self, stats: StatsMsg, num_unstarted: int, now: float) -> None:
        """Take new figures; `num_unstarted` uids have no output yet, `now` is in seconds."""
        last = self._stats
        if last is not None and last.waiting and stats.waiting:
            self._count(now - self._taken_at, stats.admitted - last.admitted)
        self._stats, self._taken_at, self._unstarted = stats, now, num_unstarted

    def forget_stats(self) -> None:
        """The next figures are those of a new scheduler, which counts from 0."""
        self._stats = None

    def waiting(self, num_open: int, num_unstarted: int) -> int:
        """How many of the open uids have to wait for others."""
        behind = num_open - self._max_running
        if self._stats is not None and self._stats.waiting:
            behind = max(behind, self._stats.waiting + num_unstarted - self._unstarted)
        return min(max(0, behind), num_open)  # those that waited may have left a dead scheduler

    def wait_s(self, num_waiting: int) -> float | None:
        """Seconds until as many have got their first step; None if that was not measured yet."""
        if not num_waiting:
            return 0.0
        if not self._seconds:
            return None
        return num_waiting * self._seconds / max(1, self._admitted)

    def check_limits(
        self, n: int, waiting: int, after: int, max_waiting: int | None, max_wait_s: float | None
    ) -> None:
        """Raise OverloadedError if `n` more uids would make the queue too long.

        waiting, after: how many wait now, and would wait then. max_waiting, max_wait_s: how many
        may wait, and for how long; None without a limit.
        """
        if max_waiting is not None and after > max_waiting:
            raise OverloadedError(
                f"{waiting} requests wait, and of this one's {n} would {after - waiting}; the "
                f"limit is {max_waiting}; try again later",
                reason="waiting_requests",
                retry_after_s=self.retry_after_s(waiting),
            )
        wait_s = self.wait_s(waiting)
        if max_wait_s is not None and wait_s is not None and wait_s > max_wait_s:
            raise OverloadedError(
                f"this request would wait for about {wait_s:.1f} s behind {waiting} others; the "
                f"limit is {max_wait_s:g} s; try again later",
                reason="queue_wait",
                retry_after_s=self.retry_after_s(waiting),
            )

    def retry_after_s(self, num_waiting: int) -> int | None:
        """`wait_s` as whole seconds, at least one."""
        wait_s = self.wait_s(num_waiting)
        return None if wait_s is None else min(MAX_RETRY_S, max(1, math.ceil(wait_s)))

    def _count(self, seconds: float, admitted: int) -> None:
        self._busy.append((seconds, admitted))
        self._seconds += seconds
        self._admitted += admitted
        while True:
            seconds, admitted = self._busy[0]
            enough = self._admitted - admitted >= MIN_ADMITTED
            if not enough or self._seconds - seconds < WINDOW_S:
                return
            self._busy.popleft()
            self._seconds -= seconds
            self._admitted -= admitted
