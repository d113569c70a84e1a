"""Values that stand as bare text between tags, written as JSON."""

from __future__ import annotations

import json
from collections.abc import Set
from typing import NoReturn

from minisrv.structured_output.value_types import type_of

# Some templates print these values as Python does.
_OF_PYTHON = {"True": "true", "False": "false", "None": "null"}


def string_part(text: str) -> str:
    """A part of a string as JSON writes it, without the quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def json_value(text: str, types: Set[str]) -> str:
    """The JSON of a value whose schema allows `types`.

    Where strings are allowed, text that is not JSON of another allowed type is a string. Where they
    are not, JSON of any type stays as it is, and only other text becomes a string.
    """
    as_string = json.dumps(text, ensure_ascii=False)
    if types == {"string"}:
        return as_string
    bare = text.strip()
    bare = _OF_PYTHON.get(bare, bare)
    try:
        found = type_of(json.loads(bare, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return as_string
    is_string = "string" in types and (found == "string" or found not in types)
    return as_string if is_string else bare


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
