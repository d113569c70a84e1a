"""Calls as Llama 3 writes them: the reply is {"name": ..., "parameters": {...}}, once or more.

A semicolon or a line break separates two calls; <|python_tag|> may precede a call.
"""

from __future__ import annotations

import re

from minisrv.frontend.tool_calls.json_call import may_become_call
from minisrv.frontend.tool_calls.parser import CallParser, State, starts_with

_TAG = "<|python_tag|>"
_SEPARATOR = re.compile(r"\s*(;\s*)?")


class LlamaParser(CallParser):
    """Without a marker, only an object that begins the reply and names a known tool is a call."""

    markers = (_TAG,)

    def read_start(self) -> State | None:
        """A bracket may begin a call; anything else is content."""
        text = self._text.lstrip()
        if not text:
            return None
        return self._expect_object(0) if text[0] == "{" else State.TEXT

    def accepts(self, name: str) -> bool:
        """After a marker any name is a call."""
        return name in self.schemas or _TAG in self._pending

    def may_be_call(self, held: str) -> bool:
        """Without a marker the text may just as well be JSON that is content."""
        if self.state is not State.OBJECT or _TAG in self._pending:
            return True
        return may_become_call(held[held.find("{") :], self.schemas)

    def read_tail(self) -> State | None:
        """Look for another call after a separator, which is content if there is none."""
        separator = _SEPARATOR.match(self._text)
        assert separator is not None
        rest = self._text[separator.end() :]
        marked = starts_with(rest, _TAG)
        if marked is None:
            return None
        if rest[0] == "{":
            return self._expect_object(separator.end())
        if marked:
            self._text = rest
        return State.GAP
