"""Which reports of a start's progress are passed on."""

from __future__ import annotations

import time

from minisrv.supervision.records import StartProgress

_FRACTION, _SECONDS = 0.01, 0.5


class LastProgress:
    """The last report that was passed on."""

    def __init__(self) -> None:
        self._last, self._at = StartProgress("", 0.0), 0.0

    def is_news(self, report: StartProgress) -> bool:
        """Whether to pass this one on: in a new phase, at its end, after a percent or a while."""
        last, now = self._last, time.monotonic()
        grown = abs(report.fraction - last.fraction) >= _FRACTION or now - self._at >= _SECONDS
        if not grown and report.fraction < 1 and report.phase == last.phase:
            return False
        self._last, self._at = report, now
        return True
