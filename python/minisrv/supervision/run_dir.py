"""The directory in which the processes of one run meet."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory of mode 0700 for this run's sockets, removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="minisrv-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
