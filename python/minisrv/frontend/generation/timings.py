"""Timings of one request: for the log, the Server-Timing header, `timings` and the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from minisrv.frontend.registry.events import Event
from minisrv.wire.messages import Start


@dataclass(slots=True)
class Choice:
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
    """Collects events. The times of a request are those of the choice that started first.

    failure_reason: `abort` or `error` for a request that did not finish normally.

    Each interval is measured by one process, so no two clocks are compared. `decode` lasts until
    the last choice ends: queue + prefill + decode + transport make up the total.
    """

    num_choices: int
    arrived_at: float = field(default_factory=time.monotonic)
    failure_reason: str | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    _first: Choice | None = None

    def add(self, event: Event) -> None:
        if event.start is not None:
            choice = self.choices[event.uid] = Choice(event.start, event.started_at)
            if self._first is None or choice.started_at < self._first.started_at:
                self._first = choice
        if event.finish and event.uid in self.choices:
            choice = self.choices[event.uid]
            choice.decode_s = event.decode_s
            choice.output_tokens = event.output_tokens
            choice.finish_reason = event.finish.reason

    @property
    def first(self) -> Choice | None:
        """The choice whose output arrived first."""
        return self._first

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last end, or until now if no choice has ended."""
        if self._first is None:
            return 0.0
        ends = [c.start.at + c.decode_s for c in self.choices.values() if c.decode_s is not None]
        if not ends:
            return time.monotonic() - self._first.started_at
        return max(ends) - min(choice.start.at for choice in self.choices.values())

    @property
    def total_s(self) -> float:
        """Seconds from arrival until now."""
        return time.monotonic() - self.arrived_at

    def server_timing(self, *, ended: bool) -> str | None:
        """The header's value, in milliseconds; None before the first output."""
        if self._first is None:
            return None
        start = self._first.start
        times = {"queue": start.queue_s, "prefill": start.prefill_s}
        if ended:
            times |= {"decode": self.decode_s, "total": self.total_s}
        parts = [f"{name};dur={seconds * 1000:.2f}" for name, seconds in times.items()]
        return ", ".join([*parts, f'cached;desc="{start.cached_tokens}"'])

    def timings(self) -> dict[str, Any]:
        """The `timings` object of a reply."""
        assert self._first is not None, "a finished reply has a first output"
        start = self._first.start
        output_tokens = sum(choice.output_tokens for choice in self.choices.values())
        decoded = sum(max(0, choice.output_tokens - 1) for choice in self.choices.values())
        decode_s = self.decode_s
        return {
            "queue_ms": round(start.queue_s * 1000, 3),
            "prefill_ms": round(start.prefill_s * 1000, 3),
            "decode_ms": round(decode_s * 1000, 3),
            "total_ms": round(self.total_s * 1000, 3),
            "prompt_tokens": start.prompt_tokens,
            "cached_tokens": start.cached_tokens,
            "output_tokens": output_tokens,
            "decode_tokens_per_s": round(decoded / decode_s, 2) if decoded and decode_s else None,
        }

    def log_values(self) -> dict[str, Any]:
        """For the last line of the request in the log."""
        if self._first is None:
            return {}
        start = self._first.start
        return {
            "queue_ms": round(start.queue_s * 1000, 1),
            "prefill_ms": round(start.prefill_s * 1000, 1),
            "decode_ms": round(self.decode_s * 1000, 1),
            "first_ms": round((self._first.started_at - self.arrived_at) * 1000),
        }
