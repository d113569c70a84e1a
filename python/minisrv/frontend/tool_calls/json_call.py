"""A tool call written as a JSON object, read while it comes: {"name": "f", "arguments": {...}}."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

MAX_NAME_CHARS = 256
_NAME_FIRST = re.compile(
    r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_NO_KEY = re.compile(r'\{\s*[^"\s]')
_KEYS = frozenset({"name", "arguments", "parameters", "type", "function", "id"})


class ObjectEnd:
    """Finds where a JSON object ends, in a text that comes in pieces.

    It counts brackets outside of strings; whether the rest is JSON is not its business.
    """

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self, depth: int = 0) -> None:
        """`depth`: brackets that are open before the first piece."""
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, piece: str, begin: int = 0) -> int | None:
        """The index in `piece` behind the last bracket, None if it is not in `piece[begin:]`."""
        for i in range(begin, len(piece)):
            char = piece[i]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


@dataclass(frozen=True, slots=True)
class Begun:
    """The name is known and the arguments begin at `end`; the object is still open there."""

    name: str
    end: int


@dataclass(frozen=True, slots=True)
class Whole:
    """The object had to be read to its `end` to know the name."""

    name: str
    arguments: str
    end: int


class NotACall:
    """The text is no call."""


NOT_A_CALL = NotACall()


class JsonHead:
    """Reads the beginning of one call from a text that grows; the answer does not depend on how.

    The usual spelling, the name first, lets the arguments be passed on as they come. Any other
    object with a name and arguments is read to its end first.
    """

    __slots__ = ("_end", "_seen")

    def __init__(self) -> None:
        self._end = ObjectEnd()
        self._seen = 0

    def read(self, text: str) -> Begun | Whole | NotACall | None:
        """What `text`, which begins with a bracket, is; None while that cannot be known."""
        if match := _NAME_FIRST.match(text):
            return Begun(match["name"], match.end())
        key = _FIRST_KEY.match(text)
        if _NO_KEY.match(text) or (key and key[1] not in _KEYS):
            return NOT_A_CALL
        end = self._end.find(text, self._seen)
        self._seen = len(text)
        return None if end is None else _read_whole(text[:end])


def _read_whole(text: str) -> Whole | NotACall:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return NOT_A_CALL
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return NOT_A_CALL
    written = _write_arguments(arguments)
    return NOT_A_CALL if written is None else Whole(name, written, len(text))


def _write_arguments(arguments: Any) -> str | None:
    """The object as JSON text; some models write it as a string that holds JSON."""
    if arguments is None:
        return "{}"
    if isinstance(arguments, str):
        try:
            return arguments if isinstance(json.loads(arguments), dict) else None
        except (ValueError, RecursionError):
            return None
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None
