"""The standard streams of a process, which whoever started it may have closed."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Open /dev/null as each of the descriptors 0 to 2 that is closed.

    Otherwise the next socket or pipe would get its number, and a child would take it for a stream.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `fd`
            os.set_inheritable(fd, True)
    # Python has no object for a stream that was closed at its start.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
