"""Chooses how many threads compute a step: as many as other processes leave cores for.

A parallel region ends with its last thread. If one thread shares its core with another process, the
others wait for it in every region: beside one busy process two threads on two cores are an order of
magnitude slower than one.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# /proc/stat counts in hundredths of a second, so a shorter period would say little.
PERIOD_S = 0.2
# Cores that others use before a thread gives way, and below which it comes back.
_TAKEN, _FREE = 0.5, 0.3
_STAT = Path("/proc/stat")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Counters in seconds: `idle` of this process's cores, `own` CPU time of this process."""

    at: float
    idle: float
    own: float


class ThreadGovernor:
    """Adapts the number of threads, between 1 and `most`, to what other processes use."""

    def __init__(
        self,
        most: int,
        set_threads: Callable[[int], None],
        read_use: Callable[[], CpuUse | None] | None = None,
        num_cores: int | None = None,
    ) -> None:
        """set_threads is called with `most` at once, and later with each change.

        read_use returns None where the system has no such counters; then `most` stays.
        """
        self._most, self._set_threads = most, set_threads
        self._read_use = read_cpu_use if read_use is None else read_use
        self._num_cores = len(os.sched_getaffinity(0)) if num_cores is None else num_cores
        self.num_threads = most
        set_threads(most)
        self._last = self._read_use() if most > 1 else None

    def adapt(self) -> None:
        """Called before every step; reads the counters every PERIOD_S."""
        last = self._last
        if last is None or time.monotonic() < last.at + PERIOD_S:
            return
        use = self._last = self._read_use()
        if use is None:
            return
        # After a pause the mean of the whole pause says nothing about now; a long step is none.
        elapsed = use.at - last.at
        if elapsed > 5 * PERIOD_S and use.own - last.own < elapsed / 2:
            return
        taken = _taken_by_others(self._num_cores, last, use)
        at_most = math.floor(self._num_cores - taken + _TAKEN)
        at_least = math.floor(self._num_cores - taken + _FREE)
        wanted = max(1, at_least, min(self.num_threads, at_most))
        wanted = min(self._most, wanted)
        if wanted != self.num_threads:
            self.num_threads = wanted
            self._set_threads(wanted)


def _taken_by_others(num_cores: int, before: CpuUse, after: CpuUse) -> float:
    """Cores that other processes used between two readings."""
    busy = num_cores * (after.at - before.at) - (after.idle - before.idle)
    return (busy - (after.own - before.own)) / (after.at - before.at)


def read_cpu_use() -> CpuUse | None:
    """The counters now; None if the system has no /proc/stat.

    Time of niced processes counts as idle, since the kernel gives this process precedence.
    """
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return None
    at = time.monotonic()
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    idle = 0
    for line in lines:
        name, *counters = line.split()
        if name in cores:
            _, nice, _, idling, waiting_for_disks, *_ = map(int, counters)
            idle += nice + idling + waiting_for_disks
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return CpuUse(at, idle / os.sysconf("SC_CLK_TCK"), usage.ru_utime + usage.ru_stime)


def usable_cores() -> int:
    """The cores that this process may use: its affinity, or a container's quota if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
