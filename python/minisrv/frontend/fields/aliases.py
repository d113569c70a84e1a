"""Fields that have two names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError

ALIASES = {
    "no_stop_trim": "include_stop_str_in_output",
    "repeat_penalty": "repetition_penalty",
    "sampling_seed": "seed",
    "return_tokens": "return_token_ids",
    "rid": "request_id",
}


def merge_aliases(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, each under its main name.

    Raises InvalidRequestError for two names with different values.
    """
    merged = {name: value for name, value in fields.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias not in fields:
            continue
        value = merged.setdefault(name, fields[alias])
        if value != fields[alias]:
            raise InvalidRequestError(
                f"{alias} is {_show(fields[alias])} and {name} is {_show(value)}; send one of them",
                param=alias,
            )
    return merged


def alias_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Main name to alias, of the fields that the request sent under their alias only."""
    return {
        name: alias for alias, name in ALIASES.items() if alias in fields and name not in fields
    }


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
