"""The supervisor over children of the test's own: order, deadline, deaths, ends."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError, EngineDeadError, MinisrvError
from minisrv.supervision import supervisor
from minisrv.supervision.records import (
    Boot,
    ChildFailed,
    ChildReady,
    EngineEnded,
    EngineReady,
    Notice,
    StartProgress,
    decode_line,
    encode_line,
)
from minisrv.supervision.supervisor import Supervisor
from tests.support.server_process import environment, wait_until

CHILD = """
import os, signal, sys, time
from minisrv.supervision.child_main import run_child
from minisrv.supervision.records import ChildReady
from minisrv.errors import ConfigError

def main(child):
    {body}

run_child("test", main)
"""
SERVE = "child.report(ChildReady({'pid': os.getpid()})); time.sleep(60)"

DIES_IN_A_DRAIN = """import threading
    from minisrv.supervision.records import DrainBegun, EngineReady
    serves = threading.Event()
    child.handle_notices(lambda notice: isinstance(notice, EngineReady) and serves.set())
    serves.wait()
    child.report(ChildReady())
    child.report(DrainBegun())
    os._exit(3)"""

# Children that report once and exit, by kind.
SHORT_LIVED = [kind for kind, module in supervisor.MODULES.items() if module.endswith(".prepare")]
PREPARE = {
    "hub": "child.report(ChildReady({'model_dir': os.environ['TEST_MODEL_DIR']}))",
    "converter": "os.mkdir(child.boot.tokenizer_dir); child.report(ChildReady())",
}

Children = Callable[..., None]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    """Write what each kind of child does; those not named serve."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**bodies: str) -> None:
        for kind in ("scheduler", "detokenizer", "tokenizer", *SHORT_LIVED):
            module = f"child_{kind}"
            body = bodies.get(kind, SERVE)
            (tmp_path / f"{module}.py").write_text(CHILD.format(body=body))
            monkeypatch.setitem(supervisor.MODULES, kind, module)

    return write


class Run:
    """`Supervisor.run` in a thread."""

    def __init__(self, model: Path | str, **options: object) -> None:
        config = ServerConfig(model=str(model), **options)  # type: ignore[arg-type]
        self.notices: list[Notice] = []
        self.times: list[float] = []
        self.error: MinisrvError | None = None
        self._others = set(psutil.Process().children())
        self.supervisor = Supervisor(config, on_notice=self._note)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _note(self, notice: Notice) -> None:
        self.notices.append(notice)
        self.times.append(time.monotonic())

    def _run(self) -> None:
        try:
            self.supervisor.run()
        except MinisrvError as error:
            self.error = error

    def wait_for(self, kind: type[Notice]) -> Notice:
        deadline = time.monotonic() + 60
        while True:
            for notice in self.notices:
                if isinstance(notice, kind):
                    return notice
            assert time.monotonic() < deadline, self.notices
            time.sleep(0.002)

    def children(self) -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if child not in self._others]

    def join(self) -> Run:
        """Wait for the end, after which nothing may be left."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert not self.children()
        assert not self.supervisor.run_dir.exists()
        return self


def test_it_is_ready_when_all_children_are_and_stops_when_told(
    children: Children, model_dir: Path
) -> None:
    children(
        scheduler="time.sleep(0.3); child.report(ChildReady({'num_pages': 7})); time.sleep(60)"
    )
    run = Run(model_dir, num_tokenizers=2)
    ready = run.wait_for(EngineReady)
    assert isinstance(ready, EngineReady)
    assert ready.facts["num_pages"] == 7
    assert len(run.children()) == 4
    assert run.supervisor.run_dir.stat().st_mode & 0o777 == 0o700
    run.supervisor.stop()
    assert run.join().error is None
    assert run.notices[-1] == EngineEnded("the server is stopping", stopping=True)


def test_children_share_the_session_and_leave_the_group(
    children: Children, model_dir: Path
) -> None:
    # Linux shares the processors between sessions; an interrupt goes to a group.
    children()
    run = Run(model_dir)
    run.wait_for(EngineReady)
    for child in run.children():
        assert os.getsid(child.pid) == os.getsid(0)
        assert os.getpgid(child.pid) == child.pid
    run.supervisor.stop()
    run.join()


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
attributes = termios.tcgetattr(2)
attributes[3] |= termios.TOSTOP
termios.tcsetattr(2, termios.TCSANOW, attributes)
from minisrv.supervision.child_handle import ChildProcess
boot = {"config": {"model": "demo"}, "run_dir": "", "epoch": 1, "index": 0}
child = ChildProcess("scheduler", "scheduler", "child_scheduler", boot, {})
while child.ready is None:
    assert not child.ended
    child.read_reports()
child.kill()
"""


def test_a_child_writes_to_a_terminal_that_stops_background_output(
    children: Children, tmp_path: Path
) -> None:
    children(scheduler="os.write(2, b'from the child'); " + SERVE)
    main, terminal = os.openpty()
    with os.fdopen(main, "rb", buffering=0) as screen:
        try:
            subprocess.run(
                [sys.executable, "-c", ON_A_TERMINAL],
                stderr=terminal,
                env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])),
                check=True,
                timeout=30,
            )
        finally:
            os.close(terminal)
        assert screen.read(100) == b"from the child"


def test_progress_is_passed_on_in_steps_of_a_percent(children: Children, model_dir: Path) -> None:
    children(
        scheduler="[child.report_progress('weights', i / 2000) for i in range(2001)]; "
        "child.report_progress('warm-up', 0.0); " + SERVE
    )
    run = Run(model_dir)
    run.wait_for(EngineReady)
    run.supervisor.stop()
    run.join()
    progress = [n for n in run.notices if isinstance(n, StartProgress)]
    assert progress[0] == StartProgress("weights", 0.0)
    assert StartProgress("weights", 1.0) in progress
    assert progress[-1] == StartProgress("warm-up", 0.0)
    assert len(progress) < 120


@pytest.mark.timed
def test_a_death_is_noticed_within_100_ms(children: Children, model_dir: Path) -> None:
    children()
    delays = []
    for _ in range(3):  # the machine may be busy once
        run = Run(model_dir, restart_limit="0")
        ready = run.wait_for(EngineReady)
        assert isinstance(ready, EngineReady)
        killed = time.monotonic()
        os.kill(ready.facts["pid"], signal.SIGKILL)
        run.wait_for(EngineEnded)
        delays.append(run.times[-1] - killed)
        assert isinstance(run.join().error, EngineDeadError)
    assert min(delays) < 0.1


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("os._exit(3)", "the scheduler process has died with exit status 3"),
        ("raise RuntimeError('no room')", "the scheduler process has died: RuntimeError: no room"),
        (
            "import threading; threading.Thread(target=threading.Event().wait).start(); 1 / 0",
            "the scheduler process has died: ZeroDivisionError: division by zero",
        ),
        ("os.kill(os.getpid(), 9)", "the scheduler process has died: it was killed by SIGKILL"),
        ("pass", "the scheduler process has died with exit status 0"),
        (SERVE.replace("60", "0.2"), "the scheduler process has died with exit status 0"),
    ],
)
def test_a_death_ends_all_and_says_why(
    body: str, sentence: str, children: Children, model_dir: Path
) -> None:
    children(scheduler=body)
    run = Run(model_dir, restart_limit="0").join()
    assert isinstance(run.error, EngineDeadError)
    assert run.error.message.startswith(sentence)
    assert run.notices[-1] == EngineEnded(run.error.message, stopping=False)


def test_a_child_that_refuses_an_option_makes_it_a_config_error(
    children: Children, model_dir: Path
) -> None:
    children(scheduler="raise ConfigError('--num-pages is too small')")
    run = Run(model_dir).join()
    assert isinstance(run.error, ConfigError)
    assert run.error.message == "--num-pages is too small"


def test_a_start_that_takes_too_long_names_who_is_late(children: Children, model_dir: Path) -> None:
    children(scheduler="time.sleep(60)", detokenizer="time.sleep(60)")
    run = Run(model_dir, start_timeout_s=4).join()  # enough for the tokenizer on any machine
    assert run.error is not None
    assert "more than 4 s, waiting for scheduler, detokenizer;" in run.error.message
    assert "--start-timeout-s" in run.error.message


def test_a_stop_during_the_start_ends_all(children: Children, model_dir: Path) -> None:
    children(scheduler="child.report_progress('weights', 0.1); time.sleep(60)")
    run = Run(model_dir)
    run.wait_for(StartProgress)
    run.supervisor.stop()
    assert run.join().error is None


def test_a_stop_before_the_start_and_after_the_end_does_no_harm(
    children: Children, model_dir: Path, new_children: Callable[[], list[psutil.Process]]
) -> None:
    children()
    early = Supervisor(ServerConfig(model=str(model_dir)))
    early.stop()
    early.run()
    early.stop()
    assert not new_children()


def test_a_frontend_that_dies_while_it_drains_by_itself_is_not_started_again(
    children: Children, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children()
    (tmp_path / "child_frontend.py").write_text(CHILD.format(body=DIES_IN_A_DRAIN))
    monkeypatch.setitem(supervisor.MODULES, "frontend", "child_frontend")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Supervisor(ServerConfig(model=str(model_dir)), listeners=[listener])
        with pytest.raises(EngineDeadError) as raised:
            server.run()
    assert raised.value.message == "the frontend process has died with exit status 3"


def test_a_tokenizer_is_converted_before_the_others_start(
    children: Children, model_dir: Path
) -> None:
    (model_dir / "tokenizer.json").unlink()
    children(
        converter=PREPARE["converter"],
        tokenizer="assert os.path.isdir(child.boot.tokenizer_dir); " + SERVE,
    )
    run = Run(model_dir)
    run.wait_for(EngineReady)
    run.supervisor.stop()
    assert run.join().error is None


class LateSelector(selectors.DefaultSelector):
    """A supervisor that runs again only when its short-lived children have exited."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        children = [key.data for key in self.get_map().values() if key.data is not None]
        wait_until(lambda: all(c.ended for c in children if c.name in SHORT_LIVED))
        return super().select(timeout)


@pytest.fixture
def start_late(
    children: Children, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Run]:
    """Start with a late supervisor and one short-lived child that does `body`."""
    monkeypatch.setattr(selectors, "DefaultSelector", LateSelector)
    monkeypatch.setenv("TEST_MODEL_DIR", str(model_dir))

    def start(kind: str, body: str) -> Run:
        children(**{kind: body})
        if kind == "converter":
            (model_dir / "tokenizer.json").unlink()
        return Run("org/name" if kind == "hub" else model_dir)

    return start


@pytest.mark.parametrize("kind", SHORT_LIVED)
def test_a_child_that_exits_right_after_ready_is_not_taken_for_dead(
    kind: str, start_late: Callable[[str, str], Run]
) -> None:
    run = start_late(kind, PREPARE[kind])
    run.wait_for(EngineReady)
    run.supervisor.stop()
    assert run.join().error is None


@pytest.mark.parametrize("kind", SHORT_LIVED)
def test_a_child_that_exits_without_ready_fails_the_start_however_late(
    kind: str, start_late: Callable[[str, str], Run]
) -> None:
    error = start_late(kind, "raise ConfigError('no such file')").join().error
    assert isinstance(error, ConfigError)
    assert error.message == "no such file"


def test_a_worker_that_dies_right_after_ready_ends_the_engine(
    children: Children, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children(scheduler="child.report(ChildReady())")
    monkeypatch.setattr(selectors, "DefaultSelector", LateSelector)
    monkeypatch.setattr(sys.modules[__name__], "SHORT_LIVED", ["scheduler"])
    run = Run(model_dir, restart_limit="0").join()
    assert isinstance(run.error, EngineDeadError)
    assert run.error.message == "the scheduler process has died with exit status 0"


def test_a_child_ignores_the_signals_that_stop_a_server(
    children: Children, model_dir: Path
) -> None:
    children()
    run = Run(model_dir)
    ready = run.wait_for(EngineReady)
    assert isinstance(ready, EngineReady)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(ready.facts["pid"], number)
    time.sleep(0.2)
    assert len(run.children()) == 3
    run.supervisor.stop()
    assert run.join().error is None


@pytest.mark.parametrize("notice", [EngineEnded("the end", stopping=True), "not a notice"])
def test_a_notice_that_cannot_be_handled_ends_the_child_loudly(notice: object) -> None:
    body = "child.handle_notices(lambda notice: 1 / 0); child.report(ChildReady()); time.sleep(60)"
    reports, status_fd = os.pipe()
    boot = Boot(
        config={"model": "demo"},
        run_dir="",
        epoch=1,
        index=0,
        status_fd=status_fd,
        parent_pid=os.getpid(),
    )
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[status_fd],
        env=environment(),
    )
    os.close(status_fd)
    assert child.stdin is not None
    with os.fdopen(reports, "rb") as lines:
        child.stdin.write(encode_line(boot))
        child.stdin.flush()
        assert decode_line(lines.readline()) == ChildReady()
        line = b"{}\n" if isinstance(notice, str) else encode_line(notice)  # type: ignore[arg-type]
        child.stdin.write(line)
        child.stdin.flush()
        try:
            assert child.wait(60) == 1
            failed = decode_line(lines.readline())
        finally:
            child.kill()
        _, errors = child.communicate()
    assert isinstance(failed, ChildFailed)
    assert errors.count(b"Traceback") == 1
    assert b"the process exits after an unexpected error" in errors
