"""The child's end of the pipes between it and its supervisor; see `child_handle` for the other.

A child starts as `python -m minisrv.<process>`. Its stdin carries a `Boot` and then notices; it
stays open as the lifeline: when it closes, the child exits. Reports leave on a status pipe, which
closes when the child dies.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.supervision import records
from minisrv.supervision.idle_memory import trim_memory, trim_when_idle
from minisrv.supervision.progress import ProgressRecord
from minisrv.supervision.records import Boot, ChildFailed, Notice, Report, StartProgress

logger = logging.getLogger("minisrv.supervision.child_main")

STDIN_FD = 0
STACKS_SIGNAL = signal.SIGUSR1  # writes the stacks of all threads to the log
BEAT_S = 0.5  # a process without work shows this often that it lives
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Child:
    """One child process, seen from inside: its boot record, its reports, its notices."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.config = ServerConfig(**boot.config)
        self._lock = threading.Lock()
        self._early: list[Notice] = []
        self._handle: Callable[[Notice], object] = self._early.append

    def open_progress(self) -> ProgressRecord:
        """Its record for the supervisor's watch, which begins when it has reported ChildReady."""
        return ProgressRecord(Path(self.boot.progress))

    def report(self, report: Report) -> None:
        os.write(self.boot.status_fd, records.encode_line(report))

    def report_progress(
        self, phase: str, fraction: float, total: float = 0, unit: str = ""
    ) -> None:
        """A ReportProgress, to the supervisor."""
        self.report(StartProgress(phase, fraction, total, unit))

    def handle_notices(self, handle: Callable[[Notice], object]) -> None:
        """Call `handle` with each notice, including those received so far; in any thread."""
        with self._lock:
            for notice in self._early:
                handle(notice)
            self._handle = handle

    def hold_lifeline(self, lines: Iterable[bytes]) -> None:
        """Pass on notices until the lifeline closes or one cannot be handled; end the process."""
        try:
            for line in lines:
                with self._lock:
                    self._handle(records.decode_line(line))
        except Exception as error:
            self.fail(error)
        os._exit(0)

    def fail(self, error: Exception) -> NoReturn:
        """Log and report an unexpected error, and end the process with status 1."""
        logger.error("the process exits after an unexpected error", exc_info=error)
        with suppress(OSError):  # nobody reads reports any more
            self.report(ChildFailed(f"{type(error).__name__}: {error}", 1))
        _leave(1)


def run_child(name: str, main: Callable[[Child], None]) -> NoReturn:
    """Run `main` as the child `name`: boot from stdin, and report why if `main` fails.

    SIGINT and SIGTERM are ignored: terminals and service managers send them to every process,
    and the supervisor ends its children when open requests have ended. So is SIGTTOU, which stops
    a background process that writes to a terminal with `stty tostop`.

    Until `end_start` there are no garbage collections: they take a fifth of the time of imports.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    gc.disable()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    lines = _read_lines(STDIN_FD)
    first = next(lines, None)
    if first is None:
        os._exit(0)
    child = Child(records.decode_line(first))
    log.setup(
        name,
        child.config.log_level,
        child.config.log_format,
        own_process=True,
        owner=child.boot.parent_pid,
    )
    _die_with_parent(child.boot.parent_pid)
    os.set_inheritable(child.boot.status_fd, False)
    threading.Thread(
        target=child.hold_lifeline, args=(lines,), name="lifeline", daemon=True
    ).start()
    try:
        main(child)
    except ConfigError as error:
        child.report(ChildFailed(error.message, 2))
        _leave(2)
    except Exception as error:
        child.fail(error)
    sys.exit(0)


def end_start() -> None:
    """Exempt what exists now from garbage collections, which would visit all of it again.

    Memory that was needed only for the start goes back to the operating system, and from now on
    what each period of work has freed.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    trim_memory()
    trim_when_idle()


def _read_lines(fd: int) -> Iterator[bytes]:
    """The lines that arrive, until the other end closes.

    Not a buffered file: at exit Python would wait for its lock, which the reading thread holds. An
    unbuffered one reads single bytes, and waits for the interpreter after each.
    """
    buffer = b""
    while chunk := os.read(fd, 65536):
        *lines, buffer = (buffer + chunk).split(b"\n")
        yield from lines


def _leave(status: int) -> NoReturn:
    """End the process at once: destructors may wait for a device or for a dead rank."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)
