"""Which process makes no progress. No clock of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

from minisrv.supervision.progress import ProgressView

T = TypeVar("T")
_LATE_S = 1.0


class StallWatch:
    """Judges by signs of life; times are by time.monotonic().

    The silence of a process counts from its last beat, and from the last `restart_clocks` at the
    earliest: while one process is being started again, others may wait for it. For the same reason
    work from before then does not count as the longest of its process: each stall would raise the
    time after which the next one is seen.
    """

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: how long a process may be silent, beyond what its work should take; or 0."""
        self._timeout_s = timeout_s or math.inf
        self._period_s = min(1.0, self._timeout_s / 4)
        self._since = 0.0
        self._checked_at = -math.inf
        self._restarted = True  # since the last check

    @property
    def next_check_at(self) -> float:
        """When `stalled` should be called again; infinite if never."""
        if self._timeout_s == math.inf:
            return math.inf
        return max(0.0, self._checked_at + self._period_s)

    def restart_clocks(self, now: float) -> None:
        """Count silence from now on."""
        self._since = self._checked_at = now
        self._restarted = True

    def stalled(
        self, views: Iterable[tuple[T, ProgressView]], now: float
    ) -> tuple[T, float] | None:
        """The process that has been silent for longest and for too long, and for how many seconds.

        A check that is late by a second shows that the machine or all processes were stopped: then
        the clocks restart.
        """
        if now - self._checked_at > self._period_s + _LATE_S:
            self.restart_clocks(now)
        self._checked_at = now
        found: tuple[T, float] | None = None
        for process, view in views:
            if self._restarted:
                view.disregard_work(now)
            else:
                view.note_longest()
            silent_s = now - max(self._since, view.last_beat)
            too_long = silent_s > self._timeout_s + view.allowance_s
            if too_long and (found is None or silent_s > found[1]):
                found = process, silent_s
        self._restarted = False
        return found
