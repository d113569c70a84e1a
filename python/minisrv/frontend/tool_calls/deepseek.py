"""Calls as DeepSeek writes them, in either of two spellings.

V3.1 writes a call as <｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>, and all calls
between <｜tool▁calls▁begin｜> and <｜tool▁calls▁end｜>. In V3 and R1 the type of the call stands
before the separator; after it come the name, a line break and the arguments as a block of code:
function<｜tool▁sep｜>name ```json {...} ```.
"""

from __future__ import annotations

from minisrv.frontend.tool_calls.json_call import MAX_NAME_CHARS
from minisrv.frontend.tool_calls.parser import CallParser, State, starts_with

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "```"


class DeepSeekParser(CallParser):
    """What follows the separator decides which spelling it is."""

    markers = (_CALLS, _CALL)

    def read_head(self) -> State | None:
        """The mark of the call, unless it was the marker, and the name around the separator."""
        if not self._hold_space():
            return None
        if _CALL not in self._pending:
            begins = starts_with(self._text, _CALL)
            if not begins:
                return None if begins is None else self._no_call()
            self._hold(len(_CALL))
        first, separator, rest = self._text.partition(_SEPARATOR)
        if not separator:
            name = first.partition("<")[0]
            begins = starts_with(first[len(name) :], _SEPARATOR)
            return None if begins is None and _may_be_name(name) else self._no_call()
        if "<" in first or not _may_be_name(first):
            return self._no_call()
        arguments = rest.lstrip()
        if not arguments:
            return None
        if arguments[0] == "{":
            return self._start(first, arguments)
        name, line_break, block = rest.partition("\n")
        if not line_break:
            return None if _may_be_name(name) else self._no_call()
        block = block.lstrip()
        for skipped in (f"{_FENCE}json", _FENCE):
            begins = starts_with(block, skipped)
            if begins is None:
                return None
            block = block[len(skipped) * begins :].lstrip()
        if not block:
            return None
        return self._start(name, block) if block[0] == "{" else self._no_call()

    def read_tail(self) -> State | None:
        """Skip the end of the block, of the call and of all calls."""
        for mark in (_FENCE, _CALL_END, _CALLS_END):
            self._text = self._text.lstrip()
            begins = starts_with(self._text, mark)
            if begins is None:
                return None
            self._consume(len(mark) * begins)
        return State.GAP

    def _start(self, name: str, arguments: str) -> State:
        name = name.strip()
        if not name or not _may_be_name(name):
            return self._no_call()
        self._start_call(name, len(self._text) - len(arguments), in_object=False)
        return State.ARGUMENTS


def _may_be_name(text: str) -> bool:
    return len(text) <= MAX_NAME_CHARS and "\n" not in text
