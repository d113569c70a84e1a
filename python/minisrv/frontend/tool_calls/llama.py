"""Calls as Llama 3 writes them: the reply is {"name": ..., "parameters": {...}}, maybe several.

Between them stands a semicolon or a line break; <|python_tag|> may stand before one.
"""

from __future__ import annotations

import re

from minisrv.frontend.tool_calls.parser import CallParser, starts_with

_BETWEEN = re.compile(r"\s*(;\s*)?")


class LlamaParser(CallParser):
    """Without a marker, only a reply that begins with a call of one of the tools is a call."""

    marker = "<|python_tag|>"

    def read_start(self) -> bool:
        """A bracket begins a call; everything else is text."""
        text = self._text.lstrip()
        if not text:
            return False
        if text[0] != "{":
            return self._to_text()
        self._to_head("", 0)
        return True

    def accepts(self, name: str) -> bool:
        """Behind the marker any name is a call."""
        return name in self.names or self.marker in self._pending

    def read_head(self) -> bool:
        """The JSON object, with or without a marker before it."""
        return self.read_json_head()

    def read_tail(self) -> bool:
        """Another call, or text."""
        between = _BETWEEN.match(self._text)
        assert between is not None
        rest = self._text[between.end() :]
        marked = starts_with(rest, self.marker)
        if marked is None:
            return False
        if rest[:1] == "{":
            self._to_head(between[0], between.end())
        elif marked:
            self._text = rest
            self._to_text()
        else:
            self._to_text()
        return True
