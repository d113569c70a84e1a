"""What the router knows of a replica between its reports."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minisrv.routing.router import ReplicaLoad

FIRST_RATE = 1000.0  # prompt tokens per second, until it is measured
DELIVERY_S = 0.05  # a report may lack what was sent to the replica just before
MAX_SENT = 10_000


@dataclass(slots=True)
class Known:
    """What is known of a replica: its number, and its queue at the Unix time `at`.

    reported_at: the Unix time of its last report. sent: when prompts were sent to it since, and how
    many of their tokens it does not have cached. open_requests: those that this router has sent.
    restarts: how often its scheduler was started again, which empties its cache.
    """

    number: int
    queued_tokens: float = 0.0
    at: float = 0.0
    rate: float = FIRST_RATE
    reported_at: float = 0.0
    sent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=MAX_SENT))
    open_requests: int = 0
    restarts: int = 0

    def load(self, now: float) -> ReplicaLoad:
        """What is left of the queue, which becomes shorter at the measured rate."""
        left = max(0.0, self.queued_tokens - self.rate * max(0.0, now - self.at))
        return ReplicaLoad(int(left), self.open_requests, self.rate)

    def take_report(self, stats: Mapping[str, Any]) -> bool:
        """Replace the estimate by a newer report, to which is added what was sent after it.

        Returns whether the replica's cache was lost.
        """
        if stats["at"] <= self.reported_at:
            return False
        self.reported_at = self.at = stats["at"]
        self.rate = stats.get("prefill_tokens_per_s") or FIRST_RATE
        while self.sent and self.sent[0][0] <= self.reported_at - DELIVERY_S:
            self.sent.popleft()
        self.queued_tokens = stats.get("num_queued_tokens", 0) + sum(n for _, n in self.sent)
        before, self.restarts = self.restarts, stats.get("restarts", 0)
        return self.restarts != before

    def add(self, tokens: int, now: float) -> None:
        """The replica gets a prompt with as many tokens that it does not have cached."""
        self.queued_tokens, self.at = self.load(now).queued_tokens + tokens, now
        self.sent.append((now, tokens))

    def take_back(self, tokens: int, sent_at: float) -> None:
        """A prompt that was added at `sent_at` goes elsewhere."""
        if (sent_at, tokens) in self.sent:  # otherwise the last report no longer counts it
            self.sent.remove((sent_at, tokens))
            self.queued_tokens = max(0.0, self.queued_tokens - tokens)
