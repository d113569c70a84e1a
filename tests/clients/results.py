"""The table of what was tried with each client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.clients.environments import ENVIRONMENTS

HEAD = """\
# Clients that were tried

Unmodified, with their default settings or as `minisrv launch` configures them, in a network
namespace without a network. `make clients` installs them, runs `tests/clients` and writes this
page.

| client | version | tried | result |
|---|---|---|---|
"""
WORDS = {"passed": "works", "failed": "**fails**", "skipped": "not tried"}


@dataclass(frozen=True)
class Result:
    """client: the name of its environment. outcome: pytest's. reason: why it was skipped."""

    client: str
    tried: str
    outcome: str
    reason: str = ""


def table(results: Sequence[Result]) -> str:
    """The page: one row for each client and outcome."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        rows.setdefault((result.client, result.outcome, result.reason), []).append(result.tried)
    lines = []
    for client, outcome, reason in sorted(rows, key=lambda row: list(ENVIRONMENTS).index(row[0])):
        tried = "; ".join(dict.fromkeys(rows[client, outcome, reason]))
        said = WORDS[outcome] + (f": {reason}" if reason else "")
        lines.append(f"| {client} | {ENVIRONMENTS[client].version()} | {tried} | {said} |\n")
    return HEAD + "".join(lines)
