"""Request fields that no table names: counted, logged once, told to the client or refused."""

from __future__ import annotations

import logging
from collections import Counter

from minisrv.errors import InvalidRequestError

logger = logging.getLogger("minisrv.frontend")

_MAX_NAMES = 1000
_MAX_SHOWN = 16
_MAX_SHOWN_CHARS = 64


class UnknownFields:
    """`counts` has at most _MAX_NAMES names, for clients choose them; the rest count as "*"."""

    def __init__(self, *, strict: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._strict = strict

    def report(self, names: list[str]) -> str | None:
        """A sentence for the client, None without names. Raises InvalidRequestError if strict."""
        if not names:
            return None
        if self._strict:
            raise InvalidRequestError(
                f"unknown field {_show(names[0])}; the server runs with --strict-params",
                param=_show(names[0]),
            )
        for name in map(_show, names):
            if name not in self.counts and len(self.counts) < _MAX_NAMES:
                logger.warning("unknown request field %s is ignored", name)
            self.counts[name if name in self.counts or len(self.counts) < _MAX_NAMES else "*"] += 1
        more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
        return f"unknown fields ignored: {', '.join(map(_show, names[:_MAX_SHOWN]))}{more}"


def _show(name: str) -> str:
    """The name in printable ASCII, for a header and a log line."""
    text = name.encode("unicode_escape").decode("ascii")
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."
