"""Libraries that are compiled once per machine and then found in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def load_compiled(command: Sequence[str], sources: Sequence[Path], version: str) -> ctypes.CDLL:
    """The library that `command` makes of `sources`, compiled if it is not in the cache.

    version: of the headers that the sources include. Raises RuntimeError if it does not compile.
    """
    parts = [" ".join([*command, version]), *(source.read_text() for source in sources)]
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisrv"
    library = cache / f"{sources[0].stem}-{fingerprint}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile([*command, *map(str, sources)], library)
    return ctypes.CDLL(str(library))


def _compile(command: list[str], library: Path) -> None:
    """Written under a temporary name first, because several processes may compile at once."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} fails:\n{done.stderr[-3000:]}")
        os.replace(partial, library)
