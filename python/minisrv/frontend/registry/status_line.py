"""The engine's load and throughput: a line of the terminal, or of the log every few seconds."""

from __future__ import annotations

import logging
from collections import deque

from minisrv import log
from minisrv.terminal_line import TerminalLine
from minisrv.wire.messages import StatsMsg

logger = logging.getLogger("minisrv.frontend")

PERIOD_S = 10.0
RATE_S = 3.0  # the terminal shows tokens per second of this time


class StatusLine:
    """Draws on the terminal of the server, or logs the difference to what it logged last.

    The log gets no line while the server is idle.
    """

    def __init__(self) -> None:
        self._terminal = log.terminal_line()
        self._recent: deque[tuple[float, StatsMsg]] = deque()
        self._last: StatsMsg | None = None
        self._logged_at = 0.0

    def take(self, stats: StatsMsg, now: float) -> None:
        """Draw the line; or log it if the last one is PERIOD_S old. `now` in seconds."""
        if self._terminal is None or not self._draw(self._terminal, stats, now):
            self._log_if_due(stats, now)

    def _draw(self, terminal: TerminalLine, stats: StatsMsg, now: float) -> bool:
        recent = self._recent
        if recent and stats.steps < recent[-1][1].steps:  # a new scheduler counts from 0
            recent.clear()
        recent.append((now, stats))
        while len(recent) > 2 and recent[1][0] <= now - RATE_S:
            recent.popleft()
        return terminal.show(describe(stats, *recent[0], now))

    def _log_if_due(self, stats: StatsMsg, now: float) -> None:
        last, seconds = self._last, now - self._logged_at
        if last is not None and seconds < PERIOD_S:
            return
        if last is not None and stats.steps < last.steps:
            last = None
        if last is not None and (stats.steps > last.steps or stats.waiting):
            prompt = stats.prompt_tokens - last.prompt_tokens
            prefilled = stats.prefilled_tokens - last.prefilled_tokens
            output = stats.output_tokens - last.output_tokens
            cached = stats.cached_tokens - last.cached_tokens
            figures = {
                "running": stats.running,
                "waiting": stats.waiting,
                "kv_use": round(stats.pages_used / stats.num_pages, 3),
                "prompt_tokens_per_s": round(prefilled / seconds, 1),
                "output_tokens_per_s": round(output / seconds, 1),
                "cache_hits": round(cached / prompt, 3) if prompt else 0.0,
                "preemptions": stats.preemptions - last.preemptions,
            }
            log.event(logger, logging.INFO, "status", figures)
        self._last, self._logged_at = stats, now


def describe(stats: StatsMsg, before_at: float, before: StatsMsg, now: float) -> str:
    """The line on the terminal. Tokens per second are since `before`, hits since the start."""
    load = "idle"
    if stats.running or stats.waiting:
        seconds = now - before_at
        output = stats.output_tokens - before.output_tokens
        rate = f"{output / seconds:.1f}" if seconds else "-"
        load = f"{stats.running} running, {stats.waiting} waiting | {rate} tokens/s"
    hits = f"{stats.cached_tokens / stats.prompt_tokens:.0%}" if stats.prompt_tokens else "-"
    return f"{load} | cache hits {hits} | {stats.pages_used} of {stats.num_pages} pages in use"
