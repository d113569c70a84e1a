"""Split the reasoning at the beginning of a reply from the text that follows, incrementally.

The joined results do not depend on how the text was cut. Line breaks at either end of the
reasoning, and those after it, belong to the tags: templates write them again.
"""

from __future__ import annotations

from enum import Enum, auto


class _State(Enum):
    START = auto()
    REASONING = auto()
    BEHIND = auto()
    TEXT = auto()


class ReasoningSplitter:
    """Splits one reply. Only its first words can open reasoning: later tags are text."""

    __slots__ = ("_begin", "_end", "_held", "_is_first", "_opened", "_state", "closed")

    def __init__(self, begin: str, end: str, opened: bool) -> None:
        """`opened`: the prompt ends inside reasoning; a tag that the reply repeats is skipped.

        `closed`: the reasoning has ended.
        """
        self._begin = begin
        self._end = end
        self._opened = opened
        self._held = ""
        self._is_first = True
        self._state = _State.START
        self.closed = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text belongs to the reasoning, as far as known."""
        return self._state is _State.REASONING or (self._opened and self._state is _State.START)

    @property
    def done(self) -> bool:
        """Whether all that follows is plain text."""
        return self._state is _State.TEXT

    def push(self, delta: str) -> tuple[str, str]:
        """The reasoning and the text that are certain after `delta`."""
        self._held += delta
        reasoning = ""
        if self._state is _State.START:
            self._read_start()
        if self._state is _State.REASONING:
            reasoning = self._read_reasoning()
        if self._state is _State.BEHIND:
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = _State.TEXT
        if self._state is not _State.TEXT:
            return reasoning, ""
        text, self._held = self._held, ""
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """The rest of the reasoning and of the text, after the last delta."""
        held, self._held = self._held, ""
        if self.in_reasoning:
            return held.rstrip("\n"), ""
        return "", held

    def _read_start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(self._begin):
            self._held = text[len(self._begin) :]
            self._state = _State.REASONING
        elif not self._begin.startswith(text):
            self._state = _State.REASONING if self._opened else _State.TEXT

    def _read_reasoning(self) -> str:
        if self._is_first:
            self._held = self._held.lstrip("\n")
        at = self._held.find(self._end)
        if at >= 0:
            reasoning = self._held[:at].rstrip("\n")
            self._held = self._held[at + len(self._end) :]
            self._state = _State.BEHIND
            self.closed = True
            return reasoning
        num_sure = len(self._held) - self._num_unsure()
        reasoning, self._held = self._held[:num_sure], self._held[num_sure:]
        self._is_first = self._is_first and not reasoning
        return reasoning

    def _num_unsure(self) -> int:
        """Characters at the end that may be line breaks before the tag, or a part of it."""
        longest = min(len(self._held), len(self._end) - 1)
        part = next((n for n in range(longest, 0, -1) if self._held.endswith(self._end[:n])), 0)
        before = self._held[: len(self._held) - part]
        return part + len(before) - len(before.rstrip("\n"))
