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

    __slots__ = ("_failures", "_held", "_include", "_states", "_stops")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`stops` are not empty strings. include: the text goes up to the end of the stop."""
        self._include = include
        self._stops = tuple(stops)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""

    def push(self, delta: str) -> tuple[str, str | None]:
        """The text that is safe to show, and the stop string when `delta` completes one."""
        first: tuple[int, int] | None = None  # (end in delta, which stop string)
        for i, stop in enumerate(self._stops):
            end = self._advance(i, delta)
            if end is None:
                continue
            if first is None or (end, -len(stop)) < (first[0], -len(self._stops[first[1]])):
                first = (end, i)
        text, num_held = self._held + delta, len(self._held)
        if first is not None:
            self._held = ""
            stop = self._stops[first[1]]
            end_of_text = num_held + first[0]
            return text[: end_of_text if self._include else end_of_text - len(stop)], stop
        num_shown = len(text) - max(self._states, default=0)
        self._held = text[num_shown:]
        return text[:num_shown], None

    def flush(self) -> str:
        """The held text, after the last delta."""
        held, self._held = self._held, ""
        return held

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
