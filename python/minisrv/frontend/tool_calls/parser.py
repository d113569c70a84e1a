"""The part of reading tool calls that all formats share: text deltas in, typed pieces out.

What comes out, joined, does not depend on how the text was cut. Text is held back only while it
may belong to a call: white space and the beginning of a marker at its end. A call is announced
when its name and the bracket of its arguments are there; what breaks off before stays text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from minisrv.frontend.tool_calls.json_call import (
    Begun,
    JsonHead,
    NotACall,
    ObjectEnd,
    Whole,
)
from minisrv.frontend.tool_calls.pieces import Piece, Text, ToolCallArguments, ToolCallStart

# Looks at the text that has come; whether it could go on, False asks for more text.
State = Callable[[], bool]


class CallParser(ABC):
    """Reads one reply. A format says what a call looks like, by `marker` and three states."""

    marker: str

    def __init__(
        self, names: frozenset[str], make_id: Callable[[], str], parallel: bool = True
    ) -> None:
        """`names` of the request's tools. Without `parallel` the reply ends with its first call.

        num_calls: so far. ended: the reply has ended with its only call, whatever else comes.
        """
        self.names = names
        self.num_calls = 0
        self.ended = False
        self._make_id = make_id
        self._parallel = parallel
        self._text = ""
        self._pending = ""
        self._pieces: list[Piece] = []
        self._state: State = self.read_start
        self._head = JsonHead()
        self._end = ObjectEnd()
        self._call_open = False
        self._in_call = False
        self._after_call = False

    @property
    def whole(self) -> bool:
        """Whether no call is without its end."""
        return not self._call_open

    def push(self, delta: str) -> list[Piece]:
        """The pieces that are sure now that `delta` has come."""
        self._text += delta
        while self._state():
            pass
        return self._take()

    def flush(self) -> list[Piece]:
        """The rest, when no more text will come."""
        if not self._in_call:
            self._add_text(self._pending + self._text)
        self._text = self._pending = ""
        self._state = self._drop
        return self._take()

    # What a format defines.

    def read_start(self) -> bool:
        """The state before any text."""
        self._state = self.read_text
        return True

    @abstractmethod
    def read_head(self) -> bool:
        """The state behind the marker, which is pending: `_begin`, `_whole_call` or `_no_call`."""

    @abstractmethod
    def read_tail(self) -> bool:
        """The state behind a call: what closes it is skipped; ends with `_to_text`."""

    # States that formats share.

    def read_text(self) -> bool:
        """Pass text on up to the next marker."""
        if self._after_call:
            self._text = self._text.lstrip()
            self._after_call = not self._text
        at = self._text.find(self.marker)
        if at < 0:
            num_sure = len(self._text) - self._num_held()
            self._add_text(self._text[:num_sure])
            self._text = self._text[num_sure:]
            return False
        before = self._text[:at].rstrip()
        self._add_text(before)
        self._to_head(self._text[len(before) : at] + self.marker, at + len(self.marker))
        return True

    def read_json_head(self) -> bool:
        """Read a call that is one JSON object, after white space."""
        self._skip_space()
        if not self._text:
            return False
        if self._text[0] != "{":
            return self._no_call()
        match self._head.read(self._text):
            case None:
                return False
            case Begun(name, end) if self.accepts(name):
                return self._begin(name, end)
            case Whole(name, arguments, end) if self.accepts(name):
                return self._whole_call(name, arguments, end)
            case NotACall() | Begun() | Whole():
                return self._no_call()

    def read_arguments(self) -> bool:
        """Pass the arguments on up to their last bracket."""
        end = self._end.find(self._text)
        piece = self._text if end is None else self._text[:end]
        if piece:
            self._pieces.append(ToolCallArguments(self.num_calls - 1, piece))
        self._text = self._text[len(piece) :]
        if end is None:
            return False
        self._call_open = False
        self._end = ObjectEnd(depth=1)
        self._state = self.skip_object if self.in_object else self.read_tail
        return self._go_on()

    def skip_object(self) -> bool:
        """Skip what follows the arguments in the object of a call."""
        end = self._end.find(self._text)
        if end is None:
            self._text = ""
            return False
        self._text = self._text[end:]
        self._state = self.read_tail
        return True

    # What formats use.

    # Whether the arguments stand in an object that has the name too.
    in_object = True

    def accepts(self, name: str) -> bool:
        """Whether it is a call. Behind a marker any name is one: clients tell the model."""
        return bool(name)

    def _to_head(self, pending: str, consumed: int) -> None:
        """Expect a call behind `consumed` characters; `pending` is text if there is none."""
        self._in_call = False
        self._pending = pending
        self._text = self._text[consumed:]
        self._head = JsonHead()
        self._state = self.read_head

    def _to_text(self) -> bool:
        self._in_call = False
        self._state = self.read_text
        return True

    def _skip_space(self) -> None:
        space = len(self._text) - len(self._text.lstrip())
        self._pending += self._text[:space]
        self._text = self._text[space:]

    def _begin(self, name: str, consumed: int) -> bool:
        """The call of `name` begins; its arguments are behind `consumed` characters."""
        self._start_call(name, consumed)
        self._call_open = True
        self._end = ObjectEnd()
        self._state = self.read_arguments
        return True

    def _whole_call(self, name: str, arguments: str, consumed: int) -> bool:
        self._start_call(name, consumed)
        self._pieces.append(ToolCallArguments(self.num_calls - 1, arguments))
        self._state = self.read_tail
        return self._go_on()

    def _no_call(self) -> bool:
        self._add_text(self._pending)
        self._pending = ""
        return self._to_text()

    def _start_call(self, name: str, consumed: int) -> None:
        self._pieces.append(ToolCallStart(self.num_calls, self._make_id(), name))
        self.num_calls += 1
        self._pending = ""
        self._text = self._text[consumed:]
        self._in_call = self._after_call = True

    def _go_on(self) -> bool:
        if not self._parallel:
            self.ended = True
            self._state = self._drop
        return True

    def _drop(self) -> bool:
        self._text = ""
        return False

    def _num_held(self) -> int:
        """Characters at the end of the text that may belong to a call: space, part of a marker."""
        longest = min(len(self._text), len(self.marker) - 1)
        part = next((n for n in range(longest, 0, -1) if self._text.endswith(self.marker[:n])), 0)
        before = self._text[: len(self._text) - part]
        return part + len(before) - len(before.rstrip())

    def _add_text(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def starts_with(text: str, literal: str) -> bool | None:
    """Whether `text` begins with `literal`; None while it is too short to tell."""
    if text.startswith(literal):
        return True
    return None if literal.startswith(text) else False
