"""What the router knows of a replica between its reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minisrv.routing.router import ReplicaLoad

FIRST_RATE = 1000.0  # prompt tokens per second, until it is measured


@dataclass(slots=True)
class Known:
    """What is known of a replica: its number, and its queue at the time `at` of this clock.

    reported_at: the Unix time of its last report. open_requests: those that this router has sent.
    restarts: how often its scheduler was started again, which empties its cache.
    """

    number: int
    queued_tokens: float = 0.0
    at: float = 0.0
    rate: float = FIRST_RATE
    reported_at: float = 0.0
    open_requests: int = 0
    restarts: int = 0

    def load(self, now: float) -> ReplicaLoad:
        """What is left of the queue, which becomes shorter at the measured rate."""
        left = max(0.0, self.queued_tokens - self.rate * (now - self.at))
        return ReplicaLoad(int(left), self.open_requests, self.rate)

    def take_report(self, stats: Mapping[str, Any], now: float) -> bool:
        """Replace the estimate by a newer report; returns whether its cache was lost."""
        if stats["at"] <= self.reported_at:
            return False
        self.reported_at = stats["at"]
        self.queued_tokens, self.at = stats.get("num_queued_tokens", 0), now
        self.rate = stats.get("prefill_tokens_per_s") or FIRST_RATE
        before, self.restarts = self.restarts, stats.get("restarts", 0)
        return self.restarts != before

    def add(self, tokens: int, now: float) -> None:
        """The replica has been sent a prompt with as many tokens that it does not have cached."""
        self.queued_tokens, self.at = self.load(now).queued_tokens + tokens, now
