"""How parts of a start report their progress."""

from __future__ import annotations

from typing import Protocol

SECONDS = "s"  # the unit of a phase that only time measures


class ReportProgress(Protocol):
    """Is called from any thread as a phase goes on."""

    def __call__(self, phase: str, fraction: float, total: float = 0, unit: str = "") -> object:
        """`fraction`, 0 to 1, of a phase is done.

        total: what all of it is, in units such as B (bytes); 0 if that is not known. For SECONDS
        it is what the phase usually takes.
        """


def no_progress(phase: str, fraction: float, total: float = 0, unit: str = "") -> None:
    """For callers that do not show the progress."""
