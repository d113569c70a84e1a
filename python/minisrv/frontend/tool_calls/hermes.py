"""Calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from minisrv.frontend.tool_calls.parser import CallParser, starts_with

_CLOSING = "</tool_call>"


class HermesParser(CallParser):
    """Each call stands between tags; some models forget the closing one."""

    marker = "<tool_call>"

    def read_head(self) -> bool:
        """The JSON object behind the opening tag."""
        return self.read_json_head()

    def read_tail(self) -> bool:
        """The closing tag, or anything else."""
        text = self._text.lstrip()
        closes = starts_with(text, _CLOSING)
        if closes is None:
            return False
        if closes:
            self._text = text[len(_CLOSING) :]
        return self._to_text()
