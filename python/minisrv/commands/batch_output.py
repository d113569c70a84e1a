"""The answers file of `minisrv batch`: each line once, whenever the process is killed."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from minisrv.errors import ConfigError

Key = str | int


class Output:
    """The answers file. A line is written whole or, after a crash, cut off at the next start.

    done: the keys of the lines that are answered. A file beside it, with `.batch` added to its
    name, says what input and settings it is for; it is on the disk before the first answer. The
    file is locked, so that two processes do not answer the same lines.
    """

    def __init__(self, path: Path, purpose: dict[str, str]) -> None:
        """Raises ConfigError if the file holds something else, or another process writes it."""
        self.done: set[Key] = set()
        _claim(path, purpose)
        path.touch()
        self._file: IO[bytes] = path.open("r+b")
        try:
            _lock(self._file, path)
            end = self._read_answers(path)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(end)
        self._file.seek(end)
        _sync_folder(path)

    def write(self, key: Key, answer: dict[str, Any]) -> None:
        """Append the answer to one line of the input."""
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add(key)

    def close(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _read_answers(self, path: Path) -> int:
        """Fill `done`; returns where the last whole answer ends."""
        end = 0
        for number, line in enumerate(self._file, 1):
            key = _key_of(line)
            if key is None:
                if self._file.read(1):  # a crash damages only the end of the file
                    raise ConfigError(
                        f"line {number} of {path} is not an answer; remove it to have its line of "
                        "the input answered again"
                    )
                break
            self.done.add(key)
            end += len(line)
        return end


def _key_of(line: bytes) -> Key | None:
    """Which line of the input this one answers; None if it is not a whole answer."""
    if not line.endswith(b"\n"):
        return None
    try:
        answer = json.loads(line)
        key = answer["custom_id"] if "custom_id" in answer else answer["index"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return key if isinstance(key, Key) else None


def _claim(path: Path, purpose: dict[str, str]) -> None:
    """Make the file that says what `path` is for, or compare `purpose` with it."""
    note = path.with_name(path.name + ".batch")
    if note.exists():
        if note.read_bytes() != _written(purpose):
            raise ConfigError(
                f"{path} was started with another input or other settings; "
                "choose another --output, or remove it and the .batch file beside it"
            )
        return
    if path.exists() and path.stat().st_size:
        raise ConfigError(f"{path} exists and is not a batch's; choose another --output")
    partial = note.with_name(note.name + ".partial")
    with partial.open("wb") as file:
        file.write(_written(purpose))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, note)
    _sync_folder(note)


def _written(purpose: dict[str, str]) -> bytes:
    return json.dumps(purpose).encode() + b"\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """The kernel unlocks the file when this process ends, however it does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is writing {path}") from None
    except OSError:
        return  # some network file systems have no locks


def _sync_folder(path: Path) -> None:
    """Wait until the name of the file is on the disk, where the file system can say so."""
    with suppress(OSError):
        folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
