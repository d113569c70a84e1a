"""The supervisor's end of the pipes between it and a child; see `child_main` for the other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from minisrv.errors import ConfigError, EngineDeadError, MinisrvError
from minisrv.supervision import records
from minisrv.supervision.progress import ProgressView
from minisrv.supervision.records import (
    Boot,
    ChildFailed,
    ChildReady,
    DrainBegun,
    Drained,
    Notice,
    Report,
)
from minisrv.supervision.run_dir import home_variables


class ChildProcess:
    """A child as its supervisor sees it: the lifeline, the reports, the exit.

    index: which one among the children of its kind.
    ready, failed: the report of that kind, once `read_reports` has returned it.
    drains, drained: whether it has reported DrainBegun, and Drained.
    progress: what it shows of its progress, if it has a record.
    killed_because: why it was killed, if its supervisor had a reason. started_at: by
    time.monotonic().
    """

    def __init__(
        self, kind: str, name: str, module: str, boot: dict[str, Any], fds: dict[str, int]
    ) -> None:
        self.kind, self.index, self.name = kind, boot["index"], name
        self.progress = ProgressView(Path(boot["progress"])) if boot.get("progress") else None
        self.killed_because: str | None = None
        self.started_at = time.monotonic()
        self.ready: ChildReady | None = None
        self.failed: ChildFailed | None = None
        self.drains = self.drained = False
        self._buffer = b""
        self.status_fd, child_fd = os.pipe()
        os.set_blocking(self.status_fd, False)
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=[child_fd, *fds.values()],
            # Out of the terminal's group: an interrupt reaches only the supervisor. Not a session
            # of its own: Linux (sched_autogroup) shares the processors between sessions first, and
            # then a busy process kept others of the server waiting for up to 200 ms.
            process_group=0,
            env={
                **os.environ,
                **home_variables(),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
        )
        os.close(child_fd)
        self.pid = self._popen.pid
        self.watched_fds = [self.status_fd]
        if sys.platform == "linux":
            self.watched_fds.append(os.pidfd_open(self.pid))
        self.notify(Boot(**boot, status_fd=child_fd, parent_pid=os.getpid(), fds=fds))
        os.set_blocking(self._stdin.fileno(), False)

    def notify(self, record: Boot | Notice) -> None:
        """Send a record; it is lost if the child is dead or its pipe is full."""
        with contextlib.suppress(OSError):
            self._stdin.write(records.encode_line(record))

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    def read_reports(self) -> list[Report]:
        """The reports received since the last call."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.status_fd, 65536):
                self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        reports: list[Report] = [records.decode_line(line) for line in lines]
        for report in reports:
            match report:
                case ChildReady():
                    self.ready = report
                case ChildFailed():
                    self.failed = report
                case DrainBegun():
                    self.drains = True
                case Drained():
                    self.drained = True
        return reports

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    def error(self) -> MinisrvError:
        """The error that says why a child has exited."""
        if self.failed is not None and self.failed.exit_code == 2:
            return ConfigError(self.failed.sentence)
        if self.killed_because is not None:
            return EngineDeadError(f"the {self.name} process {self.killed_because}")
        status = self._popen.wait()
        if self.failed is not None:
            how = f": {self.failed.sentence}"
        elif status >= 0:
            how = f" with exit status {status}"
        else:
            how = f": it was killed by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL and self.failed is None:
            how += " (the kernel does this when memory runs out)"
        return EngineDeadError(f"the {self.name} process has died{how}")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """Kill the process if it still runs, wait for it, and close the pipes."""
        self._popen.kill()
        self._popen.wait()
        self._stdin.close()
        for fd in self.watched_fds:
            os.close(fd)
