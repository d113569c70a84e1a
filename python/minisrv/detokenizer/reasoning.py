"""A thought at the beginning of a reply, apart from the text that follows, in pieces as they come.

What comes out, joined, does not depend on how the text was cut. The line breaks at both ends of a
thought, and those behind it, belong to the tags: templates write them again.
"""

from __future__ import annotations

from enum import Enum, auto


class _State(Enum):
    START = auto()
    THOUGHT = auto()
    BEHIND = auto()
    TEXT = auto()


class ThoughtSplitter:
    """Splits one reply. Only its first words can open a thought: later tags are text."""

    __slots__ = ("_begin", "_end", "_held", "_is_first", "_opened", "_state", "closed")

    def __init__(self, begin: str, end: str, opened: bool) -> None:
        """`opened`: the prompt ends inside a thought; a tag that the reply repeats is skipped.

        `closed` tells whether a thought has come to its end.
        """
        self._begin = begin
        self._end = end
        self._opened = opened
        self._held = ""
        self._is_first = True
        self._state = _State.START
        self.closed = False

    @property
    def in_thought(self) -> bool:
        """Whether what comes next belongs to a thought, as far as is known."""
        return self._state is _State.THOUGHT or (self._opened and self._state is _State.START)

    @property
    def done(self) -> bool:
        """Whether all that follows is text as it comes."""
        return self._state is _State.TEXT

    def push(self, delta: str) -> tuple[str, str]:
        """The thought and the text that are sure now that `delta` has come."""
        self._held += delta
        thought = ""
        if self._state is _State.START:
            self._read_start()
        if self._state is _State.THOUGHT:
            thought = self._read_thought()
        if self._state is _State.BEHIND:
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = _State.TEXT
        if self._state is not _State.TEXT:
            return thought, ""
        text, self._held = self._held, ""
        return thought, text

    def flush(self) -> tuple[str, str]:
        """The rest, when no more will come."""
        held, self._held = self._held, ""
        if self.in_thought:
            return held.rstrip("\n"), ""
        return "", held

    def _read_start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held = text[len(self._begin) :]
            self._state = _State.THOUGHT
        elif not self._begin.startswith(text):
            self._state = _State.THOUGHT if self._opened else _State.TEXT

    def _read_thought(self) -> str:
        if self._is_first:
            self._held = self._held.lstrip("\n")
        at = self._held.find(self._end)
        if at >= 0:
            thought = self._held[:at].rstrip("\n")
            self._held = self._held[at + len(self._end) :]
            self._state = _State.BEHIND
            self.closed = True
            return thought
        num_sure = len(self._held) - self._num_unsure()
        thought, self._held = self._held[:num_sure], self._held[num_sure:]
        self._is_first = self._is_first and not thought
        return thought

    def _num_unsure(self) -> int:
        """Characters at the end that may be line breaks before the tag, or a part of it."""
        longest = min(len(self._held), len(self._end) - 1)
        part = next((n for n in range(longest, 0, -1) if self._held.endswith(self._end[:n])), 0)
        before = self._held[: len(self._held) - part]
        return part + len(before) - len(before.rstrip("\n"))
