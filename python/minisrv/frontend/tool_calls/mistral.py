"""Calls as Mistral writes them, in both ways.

[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], and since Mistral Small 3.1
[TOOL_CALLS]name[ARGS]{...} for each call, maybe with [CALL_ID]id behind the name.
"""

from __future__ import annotations

import re

from minisrv.frontend.tool_calls.json_call import MAX_NAME_CHARS
from minisrv.frontend.tool_calls.parser import CallParser, starts_with

_NAME = re.compile(r"[\w.-]+")
_CALL_ID, _ARGUMENTS = "[CALL_ID]", "[ARGS]"


class MistralParser(CallParser):
    """The character behind the marker tells which way it is."""

    marker = "[TOOL_CALLS]"
    _in_list = False

    def read_head(self) -> bool:
        """A list, an object or a name behind the marker."""
        self._skip_space()
        if not self._text:
            return False
        if self._text[0] == "[":
            self._pending += "["
            self._text = self._text[1:]
            self._in_list = self.in_object = True
            self._state = self.read_json_head
        elif self._text[0] == "{":
            self._in_list, self.in_object = False, True
            self._state = self.read_json_head
        else:
            self._in_list = self.in_object = False
            self._state = self._read_name
        return True

    def read_tail(self) -> bool:
        """The next element or the end of a list."""
        if not self._in_list:
            return self._to_text()
        text = self._text.lstrip()
        if not text:
            return False
        if text[0] == ",":
            self._to_head(",", len(self._text) - len(text) + 1)
            self._state = self.read_json_head
            return True
        if text[0] == "]":
            self._text = text[1:]
        return self._to_text()

    def _read_name(self) -> bool:
        name = _NAME.match(self._text)
        if name is None or name.end() > MAX_NAME_CHARS:
            return self._no_call()
        at: int | None = name.end()
        for tag, value in ((_CALL_ID, _NAME), (_ARGUMENTS, None)):
            at = _skip_tag(self._text, at, tag, value) if at is not None else None
        if at is None:
            return False
        space = len(self._text) - at - len(self._text[at:].lstrip())
        if at + space == len(self._text):
            return False
        if self._text[at + space] != "{":
            return self._no_call()
        return self._begin(name[0], at + space)


def _skip_tag(text: str, at: int, tag: str, value: re.Pattern[str] | None) -> int | None:
    """The index behind an optional tag and its value at `at`; None while it cannot be known."""
    begins = starts_with(text[at:], tag)
    if not begins:
        return None if begins is None else at
    at += len(tag)
    if value is None:
        return at
    match = value.match(text, at)
    if match is None:
        return None if at == len(text) else at
    return match.end() if match.end() < len(text) else None
