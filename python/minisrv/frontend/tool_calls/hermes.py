"""Calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from minisrv.frontend.tool_calls.parser import CallParser, State, starts_with

_CLOSING = "</tool_call>"


class HermesParser(CallParser):
    """One object between tags per call; some models forget the closing tag."""

    markers = ("<tool_call>",)

    def read_tail(self) -> State | None:
        """Skip the closing tag, if there is one."""
        self._text = self._text.lstrip()
        closes = starts_with(self._text, _CLOSING)
        if closes is None:
            return None
        self._consume(len(_CLOSING) * closes)
        return State.GAP
