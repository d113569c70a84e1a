"""Host time and device idle time of steps, measured from outside the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.scheduler.loop import SchedulerLoop


@dataclass
class StepTimes:
    """Seconds per step. `gaps` is empty on a CPU, which has no timeline of its own."""

    host: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def gap_share(self) -> float:
        """Share of the time that the device was idle; NaN if unknown."""
        return sum(self.gaps) / sum(self.steps) if self.gaps else float("nan")

    def host_us(self, percentile: float) -> float:
        """A percentile of the host time, in microseconds."""
        return float(np.percentile(self.host, percentile)) * 1e6

    def gap_us(self, percentile: float) -> str:
        """A percentile of the gaps, in microseconds, as text."""
        return f"{np.percentile(self.gaps, percentile) * 1e6:.0f}" if self.gaps else "n/a"


class TimedLoop:
    """Turns a loop and times its steps.

    Host time is a turn minus the wait for the device and, on a CPU, minus the computation itself,
    which happens in `launch`. A gap is the time on the device between the end of a step and the
    point where the next one was submitted, measured by events on its stream: 0 while the host is
    ahead. Work of the host inside `launch` before its first copy does not show up as a gap.
    """

    def __init__(self, loop: SchedulerLoop, device: torch.device) -> None:
        self.loop, self._cuda = loop, device.type == "cuda"
        self._engine, self._stream = loop.engine, _stream_of(loop.engine, device)
        self._away = 0.0
        self._launched = False
        self._marks: list[tuple[Any, Any]] = []
        self.times = StepTimes()
        loop.engine = self

    def turn(self) -> None:
        """Run one turn of the loop; a turn that launches nothing is not counted."""
        self._away, self._launched = 0.0, False
        began = time.perf_counter()
        self.loop.turn()
        took = time.perf_counter() - began
        if self._launched:
            self.times.steps.append(took)
            self.times.host.append(took - self._away)

    def take(self) -> StepTimes:
        """The times measured since the last call."""
        times, self.times = self.times, StepTimes()
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            torch.cuda.synchronize()
            for (_, end), (start, _) in pairwise(marks):
                times.gaps.append(max(0.0, end.elapsed_time(start)) / 1e3)
        return times

    def close(self) -> None:
        """Give the loop its engine back."""
        self.loop.engine = self._engine

    def launch(self, batch: ForwardBatch) -> Any:
        """See ForwardEngine."""
        self._launched = True
        if not self._cuda:
            began = time.perf_counter()
            handle = self._engine.launch(batch)
            self._away += time.perf_counter() - began
            return handle
        start = self._mark()
        handle = self._engine.launch(batch)
        self._marks.append((start, self._mark()))
        return handle

    def wait(self, handle: Any) -> ForwardOutput:
        """See ForwardEngine."""
        began = time.perf_counter()
        output = self._engine.wait(handle)
        self._away += time.perf_counter() - began
        return output

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


def _stream_of(engine: Any, device: torch.device) -> Any:
    """The stream the engine computes on: its own if it has one, otherwise the current one."""
    if device.type != "cuda":
        return None
    own = [value for value in vars(engine).values() if isinstance(value, torch.cuda.Stream)]
    return own[0] if own else torch.cuda.current_stream(device)
