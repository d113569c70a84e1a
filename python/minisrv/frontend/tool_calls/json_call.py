"""A tool call written as a JSON object, read as it arrives: {"name": "f", "arguments": {...}}."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

MAX_NAME_CHARS = 256
_NAME_FIRST = re.compile(
    r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_NO_CALL = re.compile(r'[^{]|\{\s*[^"\s]')
_STRUCTURE = re.compile(r'["\\{}\[\]]')
_KEYS = frozenset({"name", "arguments", "parameters", "type", "function", "id"})


class ObjectEnd:
    """Finds where a JSON object ends in a text that arrives in pieces.

    It counts brackets outside of strings and does not check that the text is JSON.
    """

    __slots__ = ("_depth", "_escaped", "_in_string", "found")

    def __init__(self, depth: int = 0) -> None:
        """`depth`: brackets that are open before the first piece."""
        self.found = False
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find_end(self, piece: str, begin: int = 0) -> int:
        """The index in `piece` after the object's last bracket from `begin` on, or its length."""
        at, escaped_at = begin - 1, begin if self._escaped else -1
        while (match := _STRUCTURE.search(piece, at + 1)) is not None:
            at = match.start()
            char = piece[at]
            if self._in_string:
                if at != escaped_at:
                    if char == "\\":
                        escaped_at = at + 1
                    elif char == '"':
                        self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.found = True
                    return at + 1
        self._escaped = escaped_at == len(piece)
        return len(piece)


@dataclass(frozen=True, slots=True)
class JsonCall:
    """A call of `name`. Its arguments begin at `end`, or were read with the object up to there."""

    name: str
    end: int
    arguments: str | None = None


NOT_A_CALL = JsonCall("", 0)


class CallHead:
    """Reads the beginning of a call from a growing text; how the text grows changes nothing.

    The usual spelling, the name first, lets the arguments be passed on as they arrive. Any other
    object with a name and arguments is read to its end first.
    """

    __slots__ = ("_end", "_seen")

    def __init__(self) -> None:
        self._end = ObjectEnd()
        self._seen = 0

    def read_head(self, text: str) -> JsonCall | None:
        """The call that `text` begins with, or NOT_A_CALL; None while it is undecided."""
        if match := _NAME_FIRST.match(text):
            return JsonCall(match["name"], match.end())
        key = _FIRST_KEY.match(text)
        if _NO_CALL.match(text) or (key and key[1] not in _KEYS):
            return NOT_A_CALL
        end = self._end.find_end(text, self._seen)
        self._seen = len(text)
        return _read_whole(text[:end]) if self._end.found else None


def may_become_call(text: str, names: Collection[str]) -> bool:
    """Whether `text`, the beginning of an object, may go on to be a call of one of `names`."""
    try:
        begun = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return False
    function = begun.get("function")
    if isinstance(function, dict):
        begun = function
    name = begun.get("name", function if isinstance(function, str) else "")
    return (
        begun.keys() <= _KEYS
        and isinstance(name, str)
        and any(known.startswith(name) for known in names)
    )


def _read_whole(text: str) -> JsonCall:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return NOT_A_CALL
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name", value.get("function"))
    arguments = _write_arguments(value.get("arguments", value.get("parameters")))
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or arguments is None:
        return NOT_A_CALL
    return JsonCall(name, len(text), arguments)


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
