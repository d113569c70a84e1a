"""What of a response's request the model does not see: hosted tools, and what they have done."""

from __future__ import annotations

from collections import Counter
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.names import printable
from minisrv.frontend.fields.schema import describe

_MAX_SHOWN = 16


class LeftOut:
    """Collects the types of tools and items that only OpenAI's own server can use.

    tools, items: how many of each type. With `strict` the first one is an error.
    """

    def __init__(self, *, strict: bool) -> None:
        self.tools: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self._strict = strict
        self._others: list[str] = []

    def add_tool(self, kind: str, path: str) -> None:
        """A tool of type `kind`. Raises InvalidRequestError if strict."""
        self._add(self.tools, kind, path)

    def add_item(self, kind: str, path: str) -> None:
        """An item of the input, or a part of one. Raises InvalidRequestError if strict."""
        self._add(self.items, kind, path)

    def warn(self, sentence: str) -> None:
        """Something that the model does see, but not as the client may expect."""
        self._others.append(sentence)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the client."""
        sentences = [
            f"{what} left out, which this server cannot {do}: {_list(kinds)}"
            for what, do, kinds in (("tools", "run", self.tools), ("items", "read", self.items))
            if kinds
        ]
        return (*sentences, *self._others[:_MAX_SHOWN])

    def _add(self, kinds: Counter[str], kind: str, path: str) -> None:
        if self._strict:
            raise InvalidRequestError(
                f"{path} is {describe(kind)}, which this server cannot use; it runs with "
                "--strict-params",
                param=path,
                code="unsupported_parameter",
            )
        kinds[kind] += 1


def _list(kinds: Counter[str]) -> str:
    shown = [_counted(printable(kind), num) for kind, num in list(kinds.items())[:_MAX_SHOWN]]
    num_more = len(kinds) - len(shown)
    return ", ".join(shown) + (f" and {num_more} more" if num_more else "")


def _counted(kind: str, num: Any) -> str:
    return kind if num == 1 else f"{kind} ({num})"
