"""The child's end of the pipes that join it to its supervisor.

A child starts as `python -m minisrv.<process>`. Its stdin carries one boot line and then stays
open: the lifeline, whose end ends the child. Notices to the frontend come on it too. Reports to
the supervisor go out on a pipe of their own, whose end tells of the child's death. All lines are
JSON objects.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, cast

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError

logger = logging.getLogger("minisrv.supervision.child_main")

STDIN_FD = 0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a child needs to know. Paths that are not known yet, or not needed, are empty.

    index: which of several children of its kind. fds: inherited file descriptors by name.
    """

    config: dict[str, Any]
    run_dir: str
    epoch: int
    index: int
    status_fd: int
    parent_pid: int
    model_dir: str = ""
    tokenizer_dir: str = ""
    fds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """A child to the supervisor, and on to the frontend: `fraction` of `phase` is done."""

    phase: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A child to the supervisor: its work can begin, or is done; and what it found out."""

    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """A child to the supervisor, its last word: why it ends. `exit_code` 2 is a wrong option."""

    sentence: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The supervisor to the frontend: all other processes serve. `facts` are theirs together."""

    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """The supervisor to the frontend: nothing will be answered any more.

    stopping: it was asked for; otherwise a process has died.
    """

    sentence: str
    stopping: bool


Report = Progress | Ready | Failed
Notice = Progress | EngineReady | EngineEnded
_LINES = {kind.__name__: kind for kind in (Boot, Progress, Ready, Failed, EngineReady, EngineEnded)}


def encode_line(value: Boot | Report | Notice) -> bytes:
    """A line of JSON, its end included."""
    return json.dumps({"kind": type(value).__name__, **asdict(value)}).encode() + b"\n"


def decode_line(line: bytes) -> Boot | Report | Notice:
    """The value of a line that `encode_line` made; both ends are of one version."""
    fields = json.loads(line)
    return _LINES[fields.pop("kind")](**fields)


class Child:
    """One child process, seen from inside: what it was told, and how it tells."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.config = ServerConfig(**boot.config)
        self._lock = threading.Lock()
        self._early: list[Notice] = []
        self._handle: Callable[[Notice], object] = self._early.append

    def report(self, report: Report) -> None:
        """Tell the supervisor."""
        os.write(self.boot.status_fd, encode_line(report))

    def progress(self, phase: str, fraction: float) -> None:
        """Tell how far the start is: `fraction` of `phase`, 0 to 1."""
        self.report(Progress(phase, fraction))

    def listen(self, handle: Callable[[Notice], object]) -> None:
        """Call `handle` with each notice, those that came before included; in any thread."""
        with self._lock:
            for notice in self._early:
                handle(notice)
            self._handle = handle

    def hold_lifeline(self, lines: Iterable[bytes]) -> None:
        """Hand on notices until the lifeline ends, and the process with it."""
        for line in lines:
            with self._lock:
                self._handle(cast(Notice, decode_line(line)))
        os._exit(0)


def run_child(name: str, main: Callable[[Child], None]) -> NoReturn:
    """Be the child `name`: boot from stdin, run `main`, and report why if it fails.

    An interrupt from the terminal is the supervisor's to handle; SIGTERM ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    lines = open(STDIN_FD, "rb", buffering=0, closefd=False)  # noqa: SIM115
    first = lines.readline()
    if not first:
        os._exit(0)
    child = Child(cast(Boot, decode_line(first)))
    log.setup(name, child.config.log_level, child.config.log_format)
    _die_with_parent(child.boot.parent_pid)
    os.set_inheritable(child.boot.status_fd, False)
    threading.Thread(
        target=child.hold_lifeline, args=(lines,), name="lifeline", daemon=True
    ).start()
    sys.exit(_run(child, main))


def _run(child: Child, main: Callable[[Child], None]) -> int:
    try:
        main(child)
    except ConfigError as error:
        child.report(Failed(error.message, 2))
        return 2
    except Exception as error:
        logger.exception("this process ends")
        child.report(Failed(f"{type(error).__name__}: {error}", 1))
        return 1
    return 0


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)
