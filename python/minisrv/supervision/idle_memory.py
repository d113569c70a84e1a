"""Gives freed memory back to the operating system, which glibc keeps for the next allocations."""

from __future__ import annotations

import ctypes
import threading
import time

PERIOD_S = 2.0
_BUSY_SHARE = 0.05  # of one core; a process without work uses less


def trim_memory() -> None:
    """Give back all that is free: about 10 ms for 100 MiB. Without glibc it does nothing."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def trim_when_idle(period_s: float = PERIOD_S) -> None:
    """Start a thread that trims the memory once after each time of work, `period_s` later."""
    threading.Thread(target=_watch, args=(period_s,), name="idle-memory", daemon=True).start()


def _watch(period_s: float) -> None:
    has_worked = True
    used = time.process_time()
    while True:
        time.sleep(period_s)
        before, used = used, time.process_time()
        is_busy = used - before > _BUSY_SHARE * period_s
        if has_worked and not is_busy:
            trim_memory()
        has_worked = is_busy
