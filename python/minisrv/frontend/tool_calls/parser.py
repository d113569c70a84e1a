"""The state machine that finds tool calls in a reply: text deltas in, typed pieces out.

A reply is content with calls in it. A format writes a call as

    content <marker> {"name": "f", "arguments": {"x": 1}, "id": 3} <closing> content
    TEXT            |HEAD, OBJECT              |ARGUMENTS|REST    |TAIL     |GAP, TEXT

(or, without the object, the name in HEAD and then the arguments in JSON or between tags)
and the state says which of these the next character belongs to. Rules:

1. The pieces, once adjacent ones are joined, do not depend on where the text was cut. A reader
   that cannot decide yet consumes nothing and asks for more text.
2. Text is held back only while it may belong to a call: white space and part of a marker at the
   end of the content (in `_text`), and a marker whose call has not begun (in `_pending`).
3. A call begins when its name and the opening bracket of its arguments are there; from then on
   its arguments are passed on as they arrive. What goes wrong earlier is content, and so is what
   the model itself leaves unfinished. If the reply was cut off, what may be part of a call is
   dropped. An object with its keys in another order is read to its end first, so OBJECT may go to
   TAIL.
4. White space around a call is dropped, and so is what closes it.
5. Formats differ in START (Llama needs no marker there), in HEAD (Mistral has lists; several have
   names that go to ARGUMENTS directly), in ARGUMENTS (tags become JSON) and in TAIL.
6. Without parallel calls the reply is DONE as soon as the arguments of its first call are complete.

`_become` is the only place that assigns the state, and it checks the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import IntEnum, auto
from typing import Any

from minisrv.frontend.tool_calls.json_call import NOT_A_CALL, CallHead, ObjectEnd
from minisrv.frontend.tool_calls.pieces import Piece, Text, ToolCallArguments, ToolCallStart


class State(IntEnum):
    """What the next character of the reply belongs to."""

    START = auto()  # the reply has not begun
    TEXT = auto()  # content; a marker may follow
    HEAD = auto()  # what follows a marker
    OBJECT = auto()  # a call's JSON object, up to its arguments
    ARGUMENTS = auto()  # the arguments of the open call
    REST = auto()  # what follows the arguments in the call's object
    TAIL = auto()  # what closes the call, or leads to the next one
    GAP = auto()  # white space between a call and content
    DONE = auto()  # nothing: the only call is complete


MAY_BECOME: dict[State, set[State]] = {
    State.START: {State.TEXT, State.OBJECT},
    State.TEXT: {State.HEAD},
    State.HEAD: {State.OBJECT, State.ARGUMENTS, State.TEXT},
    State.OBJECT: {State.ARGUMENTS, State.TAIL, State.DONE, State.TEXT},
    State.ARGUMENTS: {State.REST, State.TAIL, State.DONE},
    State.REST: {State.TAIL},
    State.TAIL: {State.OBJECT, State.GAP},
    State.GAP: {State.TEXT},
    State.DONE: set(),
}


class CallParser(ABC):
    """Reads one reply. A format defines its marker and the readers of what it writes differently.

    A reader consumes what it is sure of and returns the next state, or None to ask for more text.
    """

    markers: tuple[str, ...]  # one begins a call; all have the same first character, only once

    def __init__(
        self,
        schemas: Mapping[str, Any],
        make_id: Callable[[], str],
        parallel: bool = True,
    ) -> None:
        """`schemas` of the arguments, by the names of the request's tools. Without `parallel` the
        reply ends with its first call.

        lost_call: the reply was cut off in a call that had not begun yet, or may have been.
        """
        self.schemas = schemas
        self.state = State.START
        self.num_calls = 0
        self.lost_call = False
        self._make_id = make_id
        self._parallel = parallel
        self._text = ""
        self._pending = ""
        self._pieces: list[Piece] = []
        self._head = CallHead()
        self._end = ObjectEnd()
        self._in_object = False
        self._readers: dict[State, Callable[[], State | None]] = {
            State.START: self.read_start,
            State.TEXT: self._read_text,
            State.HEAD: self.read_head,
            State.OBJECT: self._read_object,
            State.ARGUMENTS: self.read_arguments,
            State.REST: self._skip_rest,
            State.TAIL: self.read_tail,
            State.GAP: self._skip_gap,
            State.DONE: self._skip_all,
        }

    @property
    def whole(self) -> bool:
        """Whether the arguments of all calls so far are complete."""
        return self.state is not State.ARGUMENTS

    @property
    def ended(self) -> bool:
        """Whether the reply has ended with its only call: all further text is dropped."""
        return self.state is State.DONE

    def push(self, delta: str) -> list[Piece]:
        """The pieces that are certain now that `delta` has arrived."""
        pieces = self._pieces = []
        self._text += delta
        while (state := self._readers[self.state]()) is not None:
            self._become(state)
        return pieces

    def flush(self, *, cut_off: bool = False) -> list[Piece]:
        """The pieces in the text held back, when no more text will come.

        cut_off: the model would have written more. Then text that may be part of a call is dropped.
        """
        self._pieces = []
        held = self._pending + self._text
        if self.state not in (State.ARGUMENTS, State.TAIL):
            self.lost_call = cut_off and bool(held.strip()) and self.may_be_call(held)
            if not self.lost_call:
                self._add_text(held)
        self._text = self._pending = ""
        return self._pieces

    def _become(self, state: State) -> None:
        assert state in MAY_BECOME[self.state], (self.state, state)
        self.state = state

    # What a format may define.

    def read_start(self) -> State | None:
        """Decide what the reply begins with."""
        return State.TEXT

    def read_head(self) -> State | None:
        """Read what follows a marker, which is pending."""
        return self._expect_object(0)

    def read_arguments(self) -> State | None:
        """Read the arguments of the open call up to their end."""
        self._add_arguments(self._consume(self._end.find_end(self._text)))
        if not self._end.found:
            return None
        if not self._parallel:
            return State.DONE
        self._end = ObjectEnd(depth=1)
        return State.REST if self._in_object else State.TAIL

    @abstractmethod
    def read_tail(self) -> State | None:
        """Skip what closes a call."""

    def accepts(self, name: str) -> bool:
        """Whether `name` may be called. After a marker any may: the client answers the model."""
        return True

    def may_be_call(self, held: str) -> bool:
        """Whether more text could make a call of `held`, which is not only white space."""
        return True

    # What all formats share.

    def _read_text(self) -> State | None:
        found = [(at, mark) for mark in self.markers if (at := self._text.find(mark)) >= 0]
        if not found:
            self._add_text(self._consume(self._num_certain()))
            return None
        at, marker = min(found)
        num_before = len(self._text[:at].rstrip())
        self._add_text(self._consume(num_before))
        self._hold(at - num_before + len(marker))
        return State.HEAD

    def _num_certain(self) -> int:
        """Characters of content before white space and part of a marker at the end of the text."""
        at = self._text.rfind(self.markers[0][0])
        if at < 0 or not any(marker.startswith(self._text[at:]) for marker in self.markers):
            at = len(self._text)
        return len(self._text[:at].rstrip())

    def _expect_object(self, num_held: int) -> State:
        """An object follows `num_held` characters that are content if it is not a call."""
        self._hold(num_held)
        self._head = CallHead()
        return State.OBJECT

    def _read_object(self) -> State | None:
        if not self._hold_space():
            return None
        call = self._head.read_head(self._text)
        if call is None:
            return None
        if call is NOT_A_CALL or not self.accepts(call.name):
            return self._no_call()
        self._start_call(call.name, call.end, in_object=True)
        if call.arguments is None:
            return State.ARGUMENTS
        self._add_arguments(call.arguments)
        return State.TAIL if self._parallel else State.DONE

    def _skip_rest(self) -> State | None:
        self._consume(self._end.find_end(self._text))
        return State.TAIL if self._end.found else None

    def _skip_gap(self) -> State | None:
        self._text = self._text.lstrip()
        return State.TEXT if self._text else None

    def _skip_all(self) -> None:
        self._text = ""

    def _start_call(self, name: str, consumed: int, *, in_object: bool) -> None:
        """`in_object`: the arguments, after `consumed` characters, are part of a larger object."""
        self._pieces.append(ToolCallStart(self.num_calls, self._make_id(), name))
        self.num_calls += 1
        self._pending = ""
        self._consume(consumed)
        self._end = ObjectEnd()
        self._in_object = in_object

    def _no_call(self) -> State:
        """What is pending is content; the text after it may hold a call."""
        self._add_text(self._pending)
        self._pending = ""
        return State.TEXT

    def _add_text(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))

    def _add_arguments(self, text: str) -> None:
        if text:
            self._pieces.append(ToolCallArguments(self.num_calls - 1, text))

    def _consume(self, num_chars: int) -> str:
        consumed, self._text = self._text[:num_chars], self._text[num_chars:]
        return consumed

    def _hold(self, num_chars: int) -> None:
        self._pending += self._consume(num_chars)

    def _hold_space(self) -> bool:
        """Hold white space; whether other text follows."""
        if self._text[:1].isspace():
            self._hold(len(self._text) - len(self._text.lstrip()))
        return bool(self._text)


def starts_with(text: str, literal: str) -> bool | None:
    """Whether `text` begins with `literal`; None while it is too short to decide."""
    if text.startswith(literal):
        return True
    return None if literal.startswith(text) else False
