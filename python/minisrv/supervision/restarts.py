"""Which dead processes are started again, and when. No clock of its own."""

from __future__ import annotations

import math

from minisrv.restart_limit import RestartLimit

BACK_OFF_S = (0.2, 1.0, 5.0)


class Restarts:
    """The deaths so far, and the processes that wait for their start.

    next_at: when the next one is due; infinite if none waits. Times are in seconds on the caller's
    clock.
    """

    def __init__(self, limit: RestartLimit) -> None:
        self._limit = limit
        self._deaths: list[float] = []
        self._waiting: list[tuple[float, str, int]] = []

    @property
    def next_at(self) -> float:
        return min((at for at, _, _ in self._waiting), default=math.inf)

    def delay_s(self, now: float) -> float | None:
        """How long to wait after a death at `now`; None if there were too many.

        The more deaths in the period of the limit, the longer, up to the last of BACK_OFF_S.
        """
        self._deaths.append(now)
        if not self._limit.allows_restart(self._deaths):
            return None
        recent = [at for at in self._deaths if at > now - self._limit.seconds]
        self._deaths = recent
        return BACK_OFF_S[min(len(recent), len(BACK_OFF_S)) - 1]

    @property
    def refusal(self) -> str:
        """Why there is no further restart, to be added to the sentence about the last death."""
        if not self._limit.deaths:
            return ""
        return (
            f"; it is death number {self._limit.deaths} within {self._limit.seconds:g} s, "
            "with which --restart-limit ends the server"
        )

    def add(self, kind: str, index: int, at: float) -> None:
        """Have process number `index` of a kind started at the time `at`."""
        self._waiting.append((at, kind, index))

    def take_due(self, now: float) -> list[tuple[str, int]]:
        """The processes that are to be started now."""
        due = [(kind, index) for at, kind, index in self._waiting if at <= now]
        self._waiting = [one for one in self._waiting if one[0] > now]
        return due
