"""Calls whose arguments stand between tags, one after the other; they are passed on as JSON.

A value is bare text: strings as they are, other values in JSON. The types in the tool's schema
decide which of the two a text is. A string is passed on as it arrives, any other value once it is
complete.

A string may hold what looks like its closing tag. So a value ends only where what follows, after a
little white space, is the tag of the next argument or the end of the call.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from minisrv.frontend.tool_calls.parser import CallParser, State, starts_with
from minisrv.frontend.tool_calls.tagged_values import json_value, string_part
from minisrv.structured_output.value_types import property_schema, types_of

_MAX_SPACE = 16  # between two tags
_CLOSES_CALL = "</tool_call>"


class TaggedParser(CallParser):
    """A form defines the tags, and the readers of the head of a call and of the head of a value."""

    opening: ClassVar[str]  # begins an argument
    closing: ClassVar[str]  # ends its value
    ends: ClassVar[tuple[str, ...]]  # each ends the arguments
    value_has_own_lines: ClassVar[bool]  # line breaks stand before and after the value

    def __init__(
        self, schemas: Mapping[str, Any], make_id: Callable[[], str], parallel: bool = True
    ) -> None:
        super().__init__(schemas, make_id, parallel)
        self._schema: Any = None
        self._num_arguments = 0
        self._types: frozenset[str] | None = None  # of the open value; None between two arguments
        self._value: list[str] = []
        self._begins = False  # the open value has no text yet

    @abstractmethod
    def read_key(self, text: str) -> tuple[str | None, int] | None:
        """The key that follows `opening`, and where its value begins.

        None while it is undecided; the key is None if there is none.
        """

    def start_arguments(self, name: str, consumed: int) -> State:
        """Begin a call of `name`, whose head is `consumed` characters long."""
        self._start_call(name, consumed, in_object=False)
        self._schema, self._num_arguments, self._types = self.schemas.get(name), 0, None
        self._add_arguments("{")
        return State.ARGUMENTS

    def read_arguments(self) -> State | None:
        """Read one argument after the other up to the end of the call."""
        while True:
            if self._types is not None:
                if not self._read_value(self._types):
                    return None
                continue
            tag = self._skip_to_tag()
            if tag is None:
                return None
            if tag != self.opening:
                self._consume(len(tag))
                self._add_arguments("}")
                return State.TAIL if self._parallel else State.DONE
            if not self._open_value():
                return None

    def read_tail(self) -> State | None:
        """Skip the closing tag, if there is one."""
        self._text = self._text.lstrip()
        closes = starts_with(self._text, _CLOSES_CALL)
        if closes is None:
            return None
        self._consume(len(_CLOSES_CALL) * closes)
        return State.GAP

    def _skip_to_tag(self) -> str | None:
        """Drop what stands before the next tag; None if there is none yet."""
        at, tag = 0, ""
        while not tag:
            at = self._text.find("<", at)
            if at < 0:
                self._text = ""
                return None
            found = self._tag_at(at)
            if found is None:
                break
            tag, at = found, at + (not found)
        self._consume(at)
        return tag or None

    def _tag_at(self, at: int) -> str | None:
        tags = (self.opening, *self.ends)
        return next_tag(self._text[at : at + max(map(len, tags))], tags)

    def _open_value(self) -> bool:
        """Read the head of an argument; whether it is complete."""
        found = self.read_key(self._text[len(self.opening) :])
        if found is None:
            return False
        key, end = found
        self._consume(len(self.opening) + end)
        if key is None:
            return True
        self._types = types_of(property_schema(self._schema, key), self._schema)
        self._begins = self.value_has_own_lines
        comma = ", " if self._num_arguments else ""
        quote = '"' if self._types == {"string"} else ""
        self._add_arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._num_arguments += 1
        return True

    def _read_value(self, types: frozenset[str]) -> bool:
        """Read more of a value; whether it is complete."""
        if self._begins and self._text:
            self._consume(self._text[0] == "\n")
            self._begins = False
        end, closed = self._find_end()
        if self.value_has_own_lines and self._text[:end].endswith("\n"):
            end -= 1
        text = self._consume(end)
        if types == {"string"}:
            self._add_arguments(string_part(text))
        else:
            self._value.append(text)
        if not closed:
            return False
        text = "".join(self._value)
        self._add_arguments('"' if types == {"string"} else json_value(text, types))
        self._consume(self._text.find(self.closing) + len(self.closing))
        self._types, self._value = None, []
        return True

    def _find_end(self) -> tuple[int, bool]:
        """How many characters certainly belong to the value, and whether its end is there."""
        at = self._text.find("<")
        while at >= 0:
            begins = starts_with(self._text[at : at + len(self.closing)], self.closing)
            if begins:
                after = at + len(self.closing)
                space = self._text[after : after + _MAX_SPACE]
                tag = self._tag_at(after + len(space) - len(space.lstrip()))
                begins = None if tag is None else bool(tag)
            if begins is not False:
                return at, bool(begins)
            at = self._text.find("<", at + 1)
        return len(self._text), False


def next_tag(text: str, tags: tuple[str, ...]) -> str | None:
    """The one of `tags` that `text` begins with, or "" for none; None while it is undecided."""
    found = {tag: starts_with(text, tag) for tag in tags}
    if whole := [tag for tag in tags if found[tag]]:
        return whole[0]
    return None if None in found.values() else ""
