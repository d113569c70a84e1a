"""How a process shows its supervisor that it gets on, and what it works on: a mapped file.

The file outlives the process, and reading it needs no answer: it also shows what a process was
doing that was killed, or is stopped.
"""

from __future__ import annotations

import mmap
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:  # numpy is not loaded for it
    from minisrv.wire.arrays import Int64Array

MAX_UIDS = 4096
MESSAGE = 2  # the place of a message that is being taken; steps have the places 0 and 1
_PLACES = 3
_BEAT, _LONGEST, _LARGEST, _SIZE, _COUNTED_FROM, _FIRST = range(6)  # items of the file
_PLACE_ITEMS = 1 + MAX_UIDS
_NUM_BYTES = 8 * (_FIRST + _PLACES * _PLACE_ITEMS)


class Progress(Protocol):
    """What a process calls from its main loop."""

    def beat(self) -> None:
        """The loop turns. To be called at least every BEAT_S when there is nothing to do."""

    def begin(self, place: int, uids: array[int] | Int64Array, size: int = 1) -> None:
        """Work on requests begins. Each place has one work.

        uids: eight bytes each. size: in tokens or messages.
        """

    def end(self, place: int) -> None:
        """The work of a place is done."""


class NoProgress:
    """The Progress of a loop that nobody watches."""

    def beat(self) -> None:
        pass

    def begin(self, place: int, uids: array[int] | Int64Array, size: int = 1) -> None:
        pass

    def end(self, place: int) -> None:
        pass


def progress_path(run_dir: Path, name: str) -> Path:
    return run_dir / f"progress-{name}"


class ProgressRecord:
    """The Progress of a process that has a supervisor, which has created the file."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), _NUM_BYTES))
        self._seconds, self._items = mapped.cast("d"), mapped.cast("l")
        self._sizes = [0] * _PLACES
        self._begun_at = [0.0] * _PLACES

    def beat(self) -> None:
        """See Progress."""
        self._seconds[_BEAT] = time.monotonic()

    def begin(self, place: int, uids: array[int] | Int64Array, size: int = 1) -> None:
        """See Progress. Of more than MAX_UIDS the rest is left out."""
        listed = memoryview(cast("Any", uids))[:MAX_UIDS]
        count = _FIRST + place * _PLACE_ITEMS
        self._items[count + 1 : count + 1 + len(listed)] = listed
        self._items[count] = len(listed)
        self._sizes[place] = size
        self._seconds[_SIZE] = max(self._sizes)
        self._begun_at[place] = self._seconds[_BEAT] = time.monotonic()

    def end(self, place: int) -> None:
        """See Progress."""
        now = time.monotonic()
        seconds = self._seconds
        self._items[_FIRST + place * _PLACE_ITEMS] = 0
        if self._begun_at[place] >= seconds[_COUNTED_FROM]:
            seconds[_LONGEST] = max(seconds[_LONGEST], now - self._begun_at[place])
            seconds[_LARGEST] = max(seconds[_LARGEST], self._sizes[place])
        self._sizes[place] = 0
        seconds[_SIZE] = max(self._sizes)
        seconds[_BEAT] = now


class ProgressView:
    """What the supervisor sees of a process; it creates the file before the process starts."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # an earlier process may have it mapped
        with path.open("w+b") as file:
            file.truncate(_NUM_BYTES)
            mapped = memoryview(mmap.mmap(file.fileno(), _NUM_BYTES))
        self._seconds, self._items = mapped.cast("d"), mapped.cast("l")
        self._longest: float | None = None

    def working_on(self) -> set[int]:
        """The uids of work that has begun and not ended."""
        uids = set[int]()
        for place in range(_PLACES):
            count = _FIRST + place * _PLACE_ITEMS
            uids.update(self._items[count + 1 : count + 1 + self._items[count]])
        return uids

    @property
    def last_beat(self) -> float:
        """By time.monotonic(), which all processes of a machine share; 0 before the first."""
        return self._seconds[_BEAT]

    @property
    def allowance_s(self) -> float:
        """How long the present work may take: the longest so far, or more if it is larger."""
        larger = self._seconds[_SIZE] / max(1.0, self._seconds[_LARGEST])
        return self._seconds[_LONGEST] * max(1.0, larger)

    def note_longest(self) -> None:
        """Note the longest work so far, for `disregard_work`."""
        self._longest = self._seconds[_LONGEST]

    def disregard_work(self, now: float) -> None:
        """Forget how long work took that has ended since `note_longest`, or began before `now`.

        It may have been held up: while its process was stopped, or waited for another.
        """
        self._seconds[_COUNTED_FROM] = now
        if self._longest is None:
            self.note_longest()
        else:
            self._seconds[_LONGEST] = self._longest
