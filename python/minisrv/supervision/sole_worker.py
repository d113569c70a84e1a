"""One engine for all workers of an ASGI server: one has the place, the others wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_POLL_S = 0.2


class SoleWorker:
    """The place among the workers, which are child processes of one server.

    It is a lock on a file that the kernel releases when its holder dies.
    """

    def __init__(self, parent_pid: int) -> None:
        name = f"minisrv-{os.getuid()}-{parent_pid}.lock"
        self._path = Path(tempfile.gettempdir()) / name
        self._fd: int | None = None

    def take(self) -> bool:
        """Whether this process has the place now."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file in between.
            taken = os.fstat(fd).st_ino == os.stat(self._path).st_ino
        except (BlockingIOError, FileNotFoundError):
            taken = False
        if taken:
            self._fd = fd
        else:
            os.close(fd)
        return taken

    async def wait(self) -> bool:
        """Wait for the place; False if a signal ends the wait. Only for the main thread."""
        with _noting_signals() as noted:
            while not (taken := self.take()) and not noted:
                await asyncio.sleep(_POLL_S)
        return taken

    def leave(self) -> None:
        """Leave the place, if this process has it."""
        if self._fd is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


def workers_parent() -> int | None:
    """The process that started this one as one of its workers; None if it is not a worker."""
    parent = multiprocessing.parent_process()
    return None if parent is None else parent.pid


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """The signals that would end the server, as they arrive; their handlers run too."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
