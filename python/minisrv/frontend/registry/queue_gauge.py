"""How many requests wait for their first step, and how long that takes. No clock of its own."""

from __future__ import annotations

import math
from collections import deque

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

    def waiting(self, num_open: int, num_unstarted: int) -> int:
        """How many of the open uids have to wait for others."""
        behind = num_open - self._max_running
        if self._stats is not None and self._stats.waiting:
            behind = max(behind, self._stats.waiting + num_unstarted - self._unstarted)
        return max(0, behind)

    def wait_s(self, num_waiting: int) -> float | None:
        """Seconds until as many have got their first step; None if that was not measured yet."""
        if not num_waiting:
            return 0.0
        if not self._seconds:
            return None
        return num_waiting * self._seconds / max(1, self._admitted)

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
