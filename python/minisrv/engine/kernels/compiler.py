"""Compiles a C++ file for this machine, caches the library and loads it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minisrv.start_progress import SECONDS, ReportProgress, no_progress
from minisrv.user_cache import user_cache

_FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
_SECONDS = 300
_POLL_S = 0.5
_USUAL_S = {"cpu.cpp": 20, "packed.cpp": 10}  # of 2 busy cores; layers.cpp takes half a second
logger = logging.getLogger("minisrv.engine")
_progress: ReportProgress = no_progress


@contextlib.contextmanager
def reporting_to(progress: ReportProgress) -> Iterator[None]:
    """Report the progress of compilations in this process, wherever they become necessary."""
    global _progress
    before, _progress = _progress, progress
    try:
        yield
    finally:
        _progress = before


def load_library(source: Path) -> ctypes.CDLL | None:
    """The functions of `source`; or None, with a warning, if they cannot be compiled.

    `source` may include headers of its folder. The library is cached in $XDG_CACHE_HOME/minisrv,
    under a name that depends on the sources, the compiler and the processor.
    """
    compiler = find_compiler()
    if compiler is None:
        logger.warning("no C++ compiler found; using the plain torch operators, which are slower")
        return None
    try:
        with _cache_folder() as folder:
            library = folder / f"{source.stem}-{_fingerprint(source, compiler)}.so"
            if not library.exists():
                _compile(compiler, source, library)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning(
            "could not compile %s with %s; using the plain torch operators, which are slower: %s",
            source.name,
            compiler,
            reason.strip()[:500],
        )
        return None


def instructions(library: ctypes.CDLL) -> str:
    """What the products of `library`, which has such a function, were compiled for."""
    function = library.instructions
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def find_compiler() -> str | None:
    """The path of $CXX or of the first of c++, g++ and clang++; None if there is none."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """In the user's cache; if that is not writable, a temporary folder, removed at the end."""
    folder = user_cache()
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="minisrv-") as temporary:
        yield Path(temporary)


def _fingerprint(source: Path, compiler: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    found = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    sources = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*sources, _FLAGS, compiler, found.stdout, platform.machine()]
    return hashlib.sha256("\0".join([*parts, *sorted(processor)]).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Written under a temporary name first, because several processes may compile at once."""
    handle, partial = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        _run([compiler, *_FLAGS.split(), "-o", partial, str(source)], source.name)
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)


def _run(command: list[str], name: str) -> None:
    """Run the compiler, of which only the time shows how far it is. Raises SubprocessError."""
    phase, usual_s, started = f"compile {name}", _USUAL_S.get(name, 0), time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while (seconds := time.monotonic() - started) < _SECONDS:
                fraction = min(0.99, seconds / usual_s) if usual_s else 0.0
                _progress(phase, fraction, usual_s, SECONDS)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=_POLL_S)
                    break
            else:
                raise subprocess.TimeoutExpired(command, _SECONDS)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
    _progress(phase, 1.0, usual_s, SECONDS)
