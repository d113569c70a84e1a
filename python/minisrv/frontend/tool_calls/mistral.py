"""Calls as Mistral writes them, in either of two spellings.

[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], and since Mistral Small 3.1
[TOOL_CALLS]name[ARGS]{...} for each call, with an optional [CALL_ID]id after the name.
"""

from __future__ import annotations

import re

from minisrv.frontend.tool_calls.json_call import MAX_NAME_CHARS
from minisrv.frontend.tool_calls.parser import CallParser, State, starts_with

_NAME = re.compile(r"[\w.-]+")
_CALL_ID, _ARGUMENTS = "[CALL_ID]", "[ARGS]"


class MistralParser(CallParser):
    """The character after the marker decides which spelling it is."""

    markers = ("[TOOL_CALLS]",)
    _in_list = False

    def read_head(self) -> State | None:
        """A list, an object or a name follows the marker."""
        if not self._hold_space():
            return None
        if self._text[0] not in "[{":
            return self._read_name()
        self._in_list = self._text[0] == "["
        return self._expect_object(int(self._in_list))

    def read_tail(self) -> State | None:
        """Look for the next element or the end of a list."""
        if not self._in_list:
            return State.GAP
        self._text = self._text.lstrip()
        if not self._text:
            return None
        if self._text[0] == ",":
            return self._expect_object(1)
        self._consume(self._text[0] == "]")
        return State.GAP

    def _read_name(self) -> State | None:
        name = _NAME.match(self._text)
        if name is None or name.end() > MAX_NAME_CHARS:
            return self._no_call()
        at: int | None = name.end()
        for tag, value in ((_CALL_ID, _NAME), (_ARGUMENTS, None)):
            at = _skip_tag(self._text, at, tag, value) if at is not None else None
        if at is None:
            return None
        arguments = self._text[at:].lstrip()
        if not arguments:
            return None
        if arguments[0] != "{":
            return self._no_call()
        self._in_list = False
        self._start_call(name[0], len(self._text) - len(arguments), in_object=False)
        return State.ARGUMENTS


def _skip_tag(text: str, at: int, tag: str, value: re.Pattern[str] | None) -> int | None:
    """The index after an optional tag and its value at `at`; None while it is undecided."""
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
