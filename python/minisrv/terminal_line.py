"""A line at the end of the terminal that is drawn anew in place: progress of the start, or load.

The processes of a server share a terminal. One of them draws at a time, the supervisor during a
start and the frontend while requests run. Whatever a process logs begins by erasing the line, and
the next drawing restores it. Each drawing and each log line is one write, so they do not mix.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from pathlib import Path

ERASE = "\r\x1b[K"
_COLUMNS = 80  # of a terminal that does not know its size


class TerminalLine:
    """The line on stderr, for the job of the process `owner`.

    text: what is shown now. Nothing is drawn while the job runs in the background, where the
    terminal belongs to another program, nor while the terminal is stopped (Ctrl-S).
    """

    def __init__(self, owner: int) -> None:
        self._owner = owner
        self._fd = sys.stderr.fileno()
        self.text = ""

    @property
    def columns(self) -> int:
        """How long a text may be."""
        with contextlib.suppress(OSError):
            return (os.get_terminal_size(self._fd).columns or _COLUMNS) - 1
        return _COLUMNS - 1

    @property
    def prefix(self) -> str:
        """What other text begins with, to take the place of the line."""
        return ERASE if _in_foreground(self._owner) else ""

    def show(self, text: str) -> bool:
        """Draw `text` in place of the line; False if the job runs in the background."""
        if not _in_foreground(self._owner):
            self.text = ""
            return False
        self.text = text[: self.columns]
        self._write(ERASE + self.text)
        return True

    def keep(self) -> None:
        """Leave the line where it is; the next one is drawn below it."""
        if self.text:
            self._write(f"{ERASE}{self.text}\n")
            self.text = ""

    def erase(self) -> None:
        self._write(self.prefix)
        self.text = ""

    def _write(self, text: str) -> None:
        # Closed terminals and those that take nothing now must not hold up a server.
        with contextlib.suppress(OSError):
            if select.select([], [self._fd], [], 0)[1]:
                os.write(self._fd, text.encode("ascii", "replace"))


def open_terminal_line(owner: int) -> TerminalLine | None:
    """The line of this process, or None where only plain text is wanted.

    That is the case with NO_COLOR, and where stderr is not a terminal or only a dumb one.
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return None if plain or not sys.stderr.isatty() else TerminalLine(owner)


def _in_foreground(pid: int) -> bool:
    """Whether the process belongs to the job that its terminal listens to (Linux)."""
    if sys.platform != "linux":
        return True
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # it has ended
        return False
    _, _, group, _, _, foreground = stat.rpartition(b")")[2].split()[:6]
    return group == foreground
