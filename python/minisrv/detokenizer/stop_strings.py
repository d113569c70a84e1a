"""Stop strings in a text that arrives in pieces.

A Knuth-Morris-Pratt automaton tracks each stop string. Its state is the length of the longest
suffix of the text that is a prefix of the string: that many characters must be held back. A text
of n characters costs O(n) per string, however it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Passes text on up to the first complete stop string, and nothing from there on.

    The first is the one that ends first; of two that end together, the longer. So the result does
    not depend on how the text was cut.
    """

    __slots__ = ("_failures", "_held", "_hidden", "_include", "_states", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`stops` are not empty strings. include: the text goes up to the end of the stop."""
        self._include = include
        self._stops = tuple(stops)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # where in `_held`; the first may begin before it

    def push(self, delta: str, num_hidden: int = 0) -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string when `delta` completes one.

        The last `num_hidden` characters of `delta` are compared with the stop strings but not
        shown, except as a part of the stop string.
        """
        first: tuple[int, int] | None = None  # (end in delta, which stop string)
        for i, stop in enumerate(self._stops):
            end = self._advance(i, delta)
            if end is None:
                continue
            if first is None or (end, -len(stop)) < (first[0], -len(self._stops[first[1]])):
                first = (end, i)
        text, num_held = self._held + delta, len(self._held)
        if num_hidden:
            self._hidden.append((len(text) - num_hidden, len(text)))
        if first is not None:
            stop = self._stops[first[1]]
            end = num_held + first[0]
            shown = self._show(text, end - len(stop))
            return shown + stop if self._include else shown, stop
        return self._show(text, len(text) - max(self._states, default=0)), None

    def flush(self) -> str:
        """The held text, after the last delta."""
        return self._show(self._held, len(self._held))

    def _show(self, text: str, end: int) -> str:
        """`text` up to `end` without what is hidden; the rest is held."""
        shown, at = "", 0
        for low, high in self._hidden:
            shown += text[at : max(at, min(low, end))]
            at = max(at, min(high, end))
        shown += text[at:end]
        self._held = text[end:]
        self._hidden = [(low - end, high - end) for low, high in self._hidden if high > end]
        return shown

    def _advance(self, i: int, delta: str) -> int | None:
        """Characters of `delta` up to the end of the stop string, None if it is not complete."""
        stop, failure, state = self._stops[i], self._failures[i], self._states[i]
        if state == 0 and stop[0] not in delta:
            return None
        for end, char in enumerate(delta, 1):
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
                if state == len(stop):
                    return end
        self._states[i] = state
        return None


@lru_cache(maxsize=1024)
def _failure_function(pattern: str) -> tuple[int, ...]:
    """For each prefix of `pattern`, the length of its longest proper border."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        borders[i] = length
    return tuple(borders)
