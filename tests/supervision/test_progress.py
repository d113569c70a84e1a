"""What a supervisor sees of a process, and when it takes it for stalled."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.config import ServerConfig
from minisrv.supervision.child_main import STACKS_SIGNAL
from minisrv.supervision.progress import MAX_UIDS, MESSAGE, ProgressRecord, ProgressView
from minisrv.supervision.records import Boot, encode_line
from minisrv.supervision.stall_watch import StallWatch

DYING = """
import os, signal, sys
from array import array
from pathlib import Path
from minisrv.supervision.progress import ProgressRecord
record = ProgressRecord(Path(sys.argv[1]))
record.begin(0, array("l", [1, 2, 3]))
record.begin(1, array("l", [4]))
record.end(0)
record.begin(0, array("l", [5, 2**40]))
os.kill(os.getpid(), signal.SIGKILL)
"""

WORKING = """
import sys, time
from array import array
from pathlib import Path
from minisrv.supervision.progress import ProgressRecord
record = ProgressRecord(Path(sys.argv[1]))
while True:
    record.begin(0, array("l", [1]))
    time.sleep(0.01)
    record.end(0)
"""

INSIDE_C = """
from minisrv.supervision.child_main import run_child

def main(child):
    print("begins", flush=True)
    sum(range(10**12))

run_child("test", main)
"""


class View:
    """Implements ProgressView."""

    def __init__(self, last_beat: float, allowance_s: float = 0.0) -> None:
        self.last_beat, self.allowance_s = last_beat, allowance_s

    def note_longest(self) -> None:
        pass

    def disregard_work(self, now: float) -> None:
        pass


def test_work_that_a_killed_process_did_not_end_is_seen(tmp_path: Path) -> None:
    view = ProgressView(tmp_path / "p")
    assert view.working_on() == set()
    done = subprocess.run([sys.executable, "-c", DYING, str(tmp_path / "p")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert view.working_on() == {4, 5, 2**40}


def test_a_new_process_begins_with_a_clean_record(tmp_path: Path) -> None:
    first = ProgressView(tmp_path / "p")
    earlier = ProgressRecord(tmp_path / "p")
    earlier.begin(0, array("l", [1]))
    second = ProgressView(tmp_path / "p")
    earlier.begin(1, array("l", [2]))
    assert (first.working_on(), second.working_on()) == ({1, 2}, set())
    assert second.last_beat == 0


def test_places_are_independent_and_too_many_uids_are_left_out(tmp_path: Path) -> None:
    view, record = ProgressView(tmp_path / "p"), ProgressRecord(tmp_path / "p")
    record.begin(MESSAGE, array("l", [7]))
    record.begin(0, array("l", range(10, 10 + MAX_UIDS + 5)))
    assert view.working_on() == {7, *range(10, 10 + MAX_UIDS)}
    record.end(0)
    assert view.working_on() == {7}
    record.begin(0, array("l", []))
    assert view.working_on() == {7}


def test_a_beat_is_a_sign_of_life_and_the_allowance_grows_with_the_work(tmp_path: Path) -> None:
    view, record = ProgressView(tmp_path / "p"), ProgressRecord(tmp_path / "p")
    before = time.monotonic()
    record.beat()
    assert before <= view.last_beat <= time.monotonic()
    assert view.allowance_s == 0
    record.begin(0, array("l", [1]), size=10)
    time.sleep(0.02)
    record.end(0)
    longest = view.allowance_s
    assert 0.02 <= longest < 10
    record.begin(0, array("l", [1]), size=5)
    assert view.allowance_s == longest
    record.begin(1, array("l", [1]), size=40)
    assert view.allowance_s == pytest.approx(4 * longest)
    record.begin(0, array("l", [2]), size=1)  # beside it
    assert view.allowance_s == pytest.approx(4 * longest)
    record.end(1)
    assert view.allowance_s < 2 * longest


def test_a_process_that_is_stopped_again_and_again_is_found_as_soon_each_time(
    tmp_path: Path,
) -> None:
    """Also in the middle of its work, which then takes as long as the stop."""
    view = ProgressView(tmp_path / "p")
    process = subprocess.Popen([sys.executable, "-c", WORKING, str(tmp_path / "p")])
    try:
        while not view.working_on():
            time.sleep(0.01)
        watch = StallWatch(0.5)
        for _ in range(5):
            watch.restart_clocks(time.monotonic())
            for _ in range(5):
                assert watch.stalled([("a", view)], time.monotonic()) is None
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGSTOP)
            while (found := watch.stalled([("a", view)], time.monotonic())) is None:
                time.sleep(0.02)
            assert found[1] < 1.5  # each stop would add at least 0.5
            os.kill(process.pid, signal.SIGCONT)
            while time.monotonic() - view.last_beat > 0.1:
                time.sleep(0.01)
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


def test_work_that_a_stop_of_all_processes_has_held_up_does_not_count(tmp_path: Path) -> None:
    view, record = ProgressView(tmp_path / "p"), ProgressRecord(tmp_path / "p")
    watch = StallWatch(5.0)
    record.begin(0, array("l", [1]))
    record.end(0)  # before the first check, as the warm-up
    usual = view.allowance_s
    assert usual > 0
    for now in (100.0, 101.0):
        assert watch.stalled([("a", view)], now) is None
    record.begin(0, array("l", [1]))
    record.begin(1, array("l", [1]))
    time.sleep(0.05)
    record.end(0)
    assert view.allowance_s > usual
    assert watch.stalled([("a", view)], time.monotonic() + 200) is None
    assert view.allowance_s == usual
    record.end(1)
    assert view.allowance_s == usual


def test_the_one_that_is_silent_for_longest_is_stalled() -> None:
    watch = StallWatch(5.0)
    views: Any = [("a", View(100.0)), ("b", View(99.0)), ("c", View(98.0, allowance_s=10.0))]
    watch.restart_clocks(100.0)
    assert [watch.stalled(views, now) for now in (101.0, 102.0, 103.0, 104.0, 105.0)] == [None] * 5
    assert watch.stalled(views, 105.1) == ("a", pytest.approx(5.1))
    watch.restart_clocks(105.1)
    assert watch.stalled(views, 106.0) is None


def test_time_in_which_nobody_ran_is_not_silence() -> None:
    """The machine slept, or the whole group of processes was stopped: the check itself is late."""
    watch, views = StallWatch(5.0), [("a", View(100.0))]
    assert watch.stalled(views, 101.0) is None  # type: ignore[arg-type]
    assert watch.stalled(views, 200.0) is None  # type: ignore[arg-type]
    late = [watch.stalled(views, 200.0 + i) for i in range(1, 8)]  # type: ignore[arg-type]
    assert [found is not None for found in late] == [False] * 5 + [True] * 2


def test_without_a_timeout_nothing_is_checked() -> None:
    watch = StallWatch(0.0)
    assert watch.next_check_at == math.inf
    assert watch.stalled([("a", View(0.0))], 1e9) is None  # type: ignore[list-item]


@given(
    st.floats(1, 60),
    st.floats(0, 20),
    st.lists(st.floats(0.01, 30), min_size=1, max_size=20),
)
def test_a_process_is_stalled_exactly_when_it_is_silent_for_too_long(
    timeout_s: float, allowance_s: float, gaps: list[float]
) -> None:
    """`gaps`: between its beats. The watch looks whenever it wants to."""
    watch, view = StallWatch(timeout_s), View(0.0, allowance_s)
    watch.restart_clocks(0.0)
    now = beat = 0.0
    for gap in gaps:
        beat, view.last_beat = beat + gap, beat
        while now < beat:
            found = watch.stalled([("a", view)], now)  # type: ignore[list-item]
            assert (found is not None) == (now - view.last_beat > timeout_s + allowance_s)
            now = max(watch.next_check_at, now + 1e-6)


def test_the_stacks_of_a_process_are_written_while_it_is_inside_c() -> None:
    """In one call that neither ends nor gives the interpreter to another thread."""
    process = subprocess.Popen(
        [sys.executable, "-c", INSIDE_C],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    too_late = threading.Timer(10, process.kill)
    too_late.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        boot = Boot(
            config=ServerConfig().to_dict(),
            run_dir="",
            epoch=1,
            index=0,
            status_fd=1,
            parent_pid=os.getpid(),
        )
        process.stdin.write(encode_line(boot).decode())
        process.stdin.flush()
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.1)
        process.send_signal(STACKS_SIGNAL)
        for line in process.stderr:
            if 'File "<string>", line 6 in main' in line:
                break
        else:
            raise AssertionError("the process has ended without writing its stacks")
        assert process.poll() is None
    finally:
        too_late.cancel()
        process.kill()
        process.communicate()
