"""Names of request fields: aliases, the own names of each API, and unknown names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.fields.schema import describe

logger = logging.getLogger("minisrv.frontend")

ALIASES = {
    "no_stop_trim": "include_stop_str_in_output",
    "repeat_penalty": "repetition_penalty",
    "sampling_seed": "seed",
    "return_tokens": "return_token_ids",
    "rid": "request_id",
}
# Clients choose unknown names, so the number of those that are counted is bounded.
_MAX_COUNTED_NAMES = 1000
_MAX_SHOWN_NAMES = 16
_MAX_SHOWN_CHARS = 64


def merge_aliases(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, each under its main name.

    Raises InvalidRequestError for two names with different values.
    """
    merged = {name: value for name, value in fields.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if alias in fields and merged.setdefault(name, fields[alias]) != fields[alias]:
            own, other = (describe(value).strip('"') for value in (fields[alias], merged[name]))
            raise InvalidRequestError(
                f"{alias} is {own} and {name} is {other}; send one of them", param=alias
            )
    return merged


def alias_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Main name to alias, of the fields that the request sent under their alias only."""
    return {
        name: alias for alias, name in ALIASES.items() if alias in fields and name not in fields
    }


class FieldNames:
    """What an API calls the fields of the neutral request.

    The readers and the processes behind the frontend report faults under neutral names, those of a
    chat completion. A sentence about a field begins with its name, so the API's own name can
    replace it when the sentence is written.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        """table: neutral paths to the API's own paths; in both, `*` stands for an index.

        The longest prefix of a path that the table holds is replaced. Other paths stay as they are.
        """
        self._table = {tuple(path.split(".")): own.split(".") for path, own in table.items()}

    def own(self, path: str) -> str:
        """The API's own name of the field at the neutral `path`."""
        parts = path.split(".")
        for length in range(len(parts), 0, -1):
            pattern = tuple("*" if part.isdecimal() else part for part in parts[:length])
            if pattern in self._table:
                indexes = (part for part in parts[:length] if part.isdecimal())
                own = [next(indexes) if part == "*" else part for part in self._table[pattern]]
                return ".".join([*own, *parts[length:]])
        return path

    def name_field_of(self, error: MinisrvError) -> None:
        """Put the API's own name into `error`, in `param` and at the beginning of the sentence."""
        if error.param is not None:
            error.rename_field(self.own(error.param))


NEUTRAL_NAMES = FieldNames({})


class UnknownFields:
    """Fields that no table names: counted, logged once, reported to the client or refused.

    `counts` is by name; names beyond a limit, of one request or of all, are counted together under
    "*".
    """

    def __init__(self, *, strict: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._strict = strict

    def report(self, names: list[str]) -> list[str]:
        """Sentences for the client, none without names. Raises InvalidRequestError if strict."""
        if not names:
            return []
        shown = [printable(name) for name in names[:_MAX_SHOWN_NAMES]]
        if self._strict:
            raise InvalidRequestError(
                f"unknown field {shown[0]}; the server runs with --strict-params", param=shown[0]
            )
        for name in shown:
            if name not in self.counts and len(self.counts) < _MAX_COUNTED_NAMES:
                logger.warning("unknown request field %s is ignored", name)
                self.counts[name] = 0
            self.counts[name if name in self.counts else "*"] += 1
        num_more = len(names) - len(shown)
        if not num_more:
            return [f"unknown fields ignored: {', '.join(shown)}"]
        self.counts["*"] += num_more
        return [f"unknown fields ignored: {', '.join(shown)} and {num_more} more"]


def printable(name: str) -> str:
    """The name in printable ASCII, for a header and a log line."""
    text = name[: _MAX_SHOWN_CHARS + 1].encode("unicode_escape").decode("ascii")
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."
