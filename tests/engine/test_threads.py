"""The number of threads follows what other processes use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from minisrv.engine import threads
from minisrv.engine.threads import PERIOD_S, CpuUse, ThreadGovernor, read_cpu_use, usable_cores


class Machine:
    """Counters of a machine with `cores` cores, of which others use `others`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int, most: int) -> None:
        self.cores, self.others, self.own = cores, 0.0, 1.0
        self.now = self.idle = self.own_seconds = 1000.0
        self.reads = 0
        self.set: list[int] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.governor = ThreadGovernor(most, self.set.append, self.read, cores)

    def read(self) -> CpuUse:
        self.reads += 1
        return CpuUse(self.now, self.idle, self.own_seconds)

    def run(self, seconds: float = PERIOD_S, steps: int = 1) -> int:
        """Let time pass, with a call before each step; returns the number of threads."""
        for _ in range(steps):
            self.now += seconds
            self.own_seconds += seconds * self.own
            self.idle += seconds * (self.cores - self.own - self.others)
            self.governor.adapt()
        return self.governor.num_threads


def test_a_thread_gives_way_to_a_busy_process_and_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, cores=2, most=2)
    assert machine.run() == 2
    machine.others = 0.66  # its share beside two threads
    assert machine.run() == 1
    machine.others = 1.0
    assert machine.run(steps=20) == 1
    machine.others = 0.1
    assert machine.run() == 2
    assert machine.set == [2, 1, 2]


@pytest.mark.parametrize(
    ("cores", "most", "others", "expected"),
    [(2, 2, 2.0, 1), (8, 8, 1.0, 7), (8, 8, 7.9, 1), (8, 4, 3.0, 4), (8, 4, 5.0, 3), (1, 1, 1, 1)],
)
def test_threads_are_as_many_as_the_cores_that_are_left(
    monkeypatch: pytest.MonkeyPatch, cores: int, most: int, others: float, expected: int
) -> None:
    machine = Machine(monkeypatch, cores, most)
    machine.others = others
    assert machine.run() == expected
    machine.others = 0
    assert machine.run() == most


def test_a_use_near_the_border_does_not_move_it_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, cores=4, most=4)
    for others in (0.4, 0.45, 0.35, 0.4):
        machine.others = others
        assert machine.run() == 4
    machine.others = 0.6
    assert machine.run() == 3
    for others in (0.4, 0.45, 0.35, 0.4):
        machine.others = others
        assert machine.run() == 3


def test_the_counters_are_read_once_per_period(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, cores=2, most=2)
    machine.run(PERIOD_S / 100, steps=1050)
    assert machine.reads <= 12


def test_a_pause_is_not_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, cores=2, most=2)
    machine.others, machine.own = 1.0, 0.0
    assert machine.run(60) == 2
    assert machine.run() == 1


def test_a_step_of_seconds_is_not_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, cores=2, most=2)
    machine.others = 0.9
    assert machine.run(2.0) == 1


def test_without_counters_all_threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_STAT", Path("/nonexistent"))
    assert read_cpu_use() is None
    counts: list[int] = []
    governor = ThreadGovernor(4, counts.append, num_cores=4)
    governor.adapt()
    assert counts == [4]


def test_the_counters_of_this_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    before = read_cpu_use()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    after = read_cpu_use()
    assert before is not None
    assert after is not None
    seconds = after.at - before.at
    assert seconds >= 0.5
    assert 0 < after.own - before.own <= seconds * cores
    assert -0.05 <= after.idle - before.idle <= seconds * cores + 0.05


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 64), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 64)],
)
def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == 64
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert usable_cores() == cores
