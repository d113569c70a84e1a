"""A real terminal: tmux with its own server, of which tests see what a person would."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence

from tests.support.server_process import wait_until


class Terminal:
    """A window that runs a command, and shows its last screen after that."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], size: str) -> None:
        self._socket = f"minisrv-{uuid.uuid4().hex}"
        variables = [f"{name}={value}" for name, value in environment.items()]
        columns, rows = size.split("x")
        line = shlex.join(["env", *variables, *command])
        self._tmux("new-session", "-d", "-x", columns, "-y", rows, f"{line}; echo status $?; cat")

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", "--", text)

    def press(self, *keys: str) -> None:
        """tmux's names: Enter, C-c, M-Enter."""
        self._tmux("send-keys", *keys)

    def paste(self, text: str) -> None:
        """As terminals do it for programs that ask for marks around a paste."""
        subprocess.run(
            ["tmux", "-L", self._socket, "load-buffer", "-"], input=text, text=True, check=True
        )
        self._tmux("paste-buffer", "-p")

    def resize(self, size: str) -> None:
        columns, rows = size.split("x")
        self._tmux("resize-window", "-x", columns, "-y", rows)

    @property
    def screen(self) -> str:
        """All lines, those that were scrolled away included; wrapped ones joined."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    @property
    def colours(self) -> str:
        """The same with escape sequences."""
        return self._tmux("capture-pane", "-p", "-e", "-J", "-S", "-")

    def wait_for(self, pattern: str, timeout_s: float = 60) -> str:
        """The screen when it has the pattern."""
        try:
            wait_until(lambda: re.search(pattern, self.screen, re.MULTILINE), timeout_s)
        except AssertionError:
            raise AssertionError(f"no {pattern!r} on the screen:\n{self.screen}") from None
        return self.screen

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._socket, "-f", "/dev/null", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextlib.contextmanager
def terminal(
    command: Sequence[str], environment: Mapping[str, str], size: str = "80x24"
) -> Iterator[Terminal]:
    opened = Terminal(command, environment, size)
    try:
        yield opened
    finally:
        opened.close()
