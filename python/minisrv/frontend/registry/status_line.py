"""A log line every few seconds of work, with the engine's load and throughput."""

from __future__ import annotations

import logging

from minisrv import log
from minisrv.wire.messages import StatsMsg

logger = logging.getLogger("minisrv.frontend")

PERIOD_S = 10.0


class StatusLine:
    """Logs the difference to the statistics of the last line; silent while idle."""

    def __init__(self) -> None:
        self._last: StatsMsg | None = None
        self._logged_at = 0.0

    def log_if_due(self, stats: StatsMsg, now: float) -> None:
        """Log if the last line is PERIOD_S old; `now` in seconds."""
        last, seconds = self._last, now - self._logged_at
        if last is not None and seconds < PERIOD_S:
            return
        if last is not None and stats.steps < last.steps:  # a new scheduler counts from 0
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
