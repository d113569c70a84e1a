"""Timings of one request: for the log, the Server-Timing header, `timings` and the metrics."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from minisrv.wire.events import Event
from minisrv.wire.messages import Start


@dataclass(slots=True)
class ChoiceTimings:
    """One choice.

    started_at: when its first output arrived, on the frontend's clock.
    decode_s: from first to last token, on the scheduler's clock; None until the choice has ended.
    """

    start: Start
    started_at: float
    decode_s: float | None = None
    output_tokens: int = 0
    finish_reason: str | None = None


@dataclass(slots=True)
class RequestTimings:
    """Collects events. The times of a request are those of `first`, the choice that started first.

    failure_reason: `abort` or `error` for a request that did not finish normally.

    Each interval is measured by one process, so no two clocks are compared. `decode` lasts until
    the last choice ends: queue + prefill + decode + transport make up the total.
    first_token_at, last_token_at: of all choices, on the scheduler's clock; the latter of those
    that have ended.
    """

    num_choices: int
    arrived_at: float = field(default_factory=time.monotonic)
    failure_reason: str | None = None
    choices: dict[int, ChoiceTimings] = field(default_factory=dict)
    first: ChoiceTimings | None = None
    first_token_at: float = math.inf
    last_token_at: float = -math.inf

    def add(self, event: Event) -> None:
        """Take over the times of an event that starts or ends a choice."""
        if event.start is not None:
            choice = self.choices[event.uid] = ChoiceTimings(event.start, event.started_at)
            self.first_token_at = min(self.first_token_at, event.start.at)
            if self.first is None or choice.started_at < self.first.started_at:
                self.first = choice
        if event.finish and event.uid in self.choices:
            choice = self.choices[event.uid]
            if event.ended_at is not None:
                choice.decode_s = event.ended_at - choice.start.at
                self.last_token_at = max(self.last_token_at, event.ended_at)
            choice.output_tokens = event.output_tokens
            choice.finish_reason = event.finish.reason

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last end, or until now if no choice has ended."""
        if self.first is None:
            return 0.0
        if self.last_token_at < self.first_token_at:
            return time.monotonic() - self.first.started_at
        return self.last_token_at - self.first_token_at

    @property
    def total_s(self) -> float:
        """Seconds from arrival until now."""
        return time.monotonic() - self.arrived_at

    def server_timing(self, *, ended: bool) -> str | None:
        """The header's value, in milliseconds; None before the first output."""
        if self.first is None:
            return None
        start = self.first.start
        times = {"queue": start.queue_s, "prefill": start.prefill_s}
        if ended:
            times |= {"decode": self.decode_s, "total": self.total_s}
        parts = [f"{name};dur={seconds * 1000:.2f}" for name, seconds in times.items()]
        return ", ".join([*parts, f'cached;desc="{start.cached_tokens}"'])

    def timings(self) -> dict[str, Any]:
        """The `timings` object of a reply that has finished."""
        assert self.first is not None, "a finished reply has a first output"
        counts = [choice.output_tokens for choice in self.choices.values()]
        num_decoded = sum(max(0, count - 1) for count in counts)
        speed = round(num_decoded / self.decode_s, 2) if num_decoded and self.decode_s else None
        return {
            **self._phases_ms(3),
            "total_ms": round(self.total_s * 1000, 3),
            "prompt_tokens": self.first.start.prompt_tokens,
            "cached_tokens": self.first.start.cached_tokens,
            "output_tokens": sum(counts),
            "decode_tokens_per_s": speed,
        }

    def log_values(self) -> dict[str, Any]:
        """For the last line of the request in the log."""
        if self.first is None:
            return {}
        first_ms = round((self.first.started_at - self.arrived_at) * 1000)
        return {**self._phases_ms(1), "first_ms": first_ms}

    def _phases_ms(self, digits: int) -> dict[str, float]:
        assert self.first is not None
        start = self.first.start
        phases = {"queue": start.queue_s, "prefill": start.prefill_s, "decode": self.decode_s}
        return {f"{name}_ms": round(s * 1000, digits) for name, s in phases.items()}
