"""Fields that are one and the same under two names."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError

ALIASES = {
    "no_stop_trim": "include_stop_str_in_output",
    "repeat_penalty": "repetition_penalty",
    "sampling_seed": "seed",
    "return_tokens": "return_token_ids",
    "rid": "request_id",
}


def merge_aliases(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, each under its one name.

    Raises InvalidRequestError for two names with different values.
    """
    merged = {name: value for name, value in fields.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias not in fields:
            continue
        value = merged.setdefault(name, fields[alias])
        if value != fields[alias]:
            raise InvalidRequestError(
                f"{alias} is {_show(fields[alias])} and {name} {_show(value)}; send one of them",
                param=alias,
            )
    return merged


def name_sent(name: str | None, fields: dict[str, Any]) -> str | None:
    """What the request calls the field `name`, for the `param` of an error."""
    sent = (alias for alias, merged in ALIASES.items() if merged == name and alias in fields)
    return name if name in fields else next(sent, name)


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
