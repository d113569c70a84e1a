"""The directory in which the processes of one run meet."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minisrv.errors import MinisrvError


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory of mode 0700 for this run's sockets, removed at the end.

    Raises MinisrvError if there is no place for it.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix="minisrv-"))
    except OSError as error:
        raise MinisrvError(
            f"there is no directory for temporary files: {error.strerror}; set TMPDIR to one that "
            "can be written"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def home_variables() -> dict[str, str]:
    """HOME and USER for a user id without a passwd entry whose environment lacks them.

    Libraries look for their caches below HOME, and some fail without it.
    """
    try:
        pwd.getpwuid(os.getuid())
        return {}
    except KeyError:
        home = {"HOME": tempfile.gettempdir(), "USER": str(os.getuid())}
        return {name: value for name, value in home.items() if name not in os.environ}
