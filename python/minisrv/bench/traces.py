"""Traces of real traffic: when requests arrived, and how many tokens went in and out.

Three forms are read; the columns say which one a file has. Azure's CSV has TIMESTAMP (a date),
ContextTokens and GeneratedTokens. Mooncake's JSONL has timestamp (ms), input_length, output_length
and hash_ids. Our own, CSV or JSONL, has the fields of TraceRequest: arrival_s, input_tokens,
output_tokens and optionally session.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from minisrv.errors import ConfigError

BLOCK_TOKENS = 512
MOST_TOKENS = 1 << 24  # of a prompt and of an output; more than any model's context
DIVISORS = [1 << n for n in range(BLOCK_TOKENS.bit_length())]  # of the lengths of a trace


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    arrival_s: since the first request of the trace. output_tokens: at least 1.
    block_ids: one for each BLOCK_TOKENS tokens of the prompt, the last block may be a part; equal
    ids are equal tokens. Empty if the trace does not say what prompts have in common.
    session: equal for the turns of one conversation; None if the trace does not say.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    session: str | None = None


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a file (all if None), in the order of their arrival.

    Raises ConfigError for a file that cannot be read, naming the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = (_json_rows if _is_jsonl(path) else _csv_rows)(file, path)
            requests = [_read(row, path, number) for number, row in islice(rows, limit)]
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the trace {path} is not UTF-8") from None
    if not requests:
        raise ConfigError(f"the trace {path} has no requests")
    requests.sort(key=lambda request: request.arrival_s)
    first = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first) for request in requests]


def _is_jsonl(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json")


def _csv_rows(file: Iterable[str], path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num} of {path} is not CSV: {error}") from None


def _json_rows(file: Iterable[str], path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {number} of {path} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} of {path} is not a JSON object")
        yield number, row


def _read(row: Mapping[str, Any], path: Path, number: int) -> TraceRequest:
    for column, read in _FORMS.items():
        if column in row:
            try:
                request = read(row)
                _check(request)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                fault = f"has no {error}" if isinstance(error, KeyError) else f"is wrong: {error}"
                raise ConfigError(f"line {number} of the trace {path} {fault}") from None
            return request
    raise ConfigError(
        f"line {number} of the trace {path} has none of the columns {', '.join(_FORMS)}; "
        "see docs/bench.md for the forms that can be read"
    )


def _check(request: TraceRequest) -> None:
    if not math.isfinite(request.arrival_s):
        raise ValueError(f"the time of arrival is {request.arrival_s}")
    if request.input_tokens < 1 or request.output_tokens < 1:
        raise ValueError("a request has at least one token in and one out")
    if max(request.input_tokens, request.output_tokens) > MOST_TOKENS:
        raise ValueError(f"a request has at most {MOST_TOKENS} tokens in and out")
    blocks = math.ceil(request.input_tokens / BLOCK_TOKENS)
    if request.block_ids and len(request.block_ids) != blocks:
        raise ValueError(f"{request.input_tokens} tokens are not {len(request.block_ids)} blocks")
    if min(request.block_ids, default=0) < 0:
        raise ValueError("an id of a block is negative")


def _read_azure(row: Mapping[str, Any]) -> TraceRequest:
    arrived = datetime.fromisoformat(row["TIMESTAMP"])
    if arrived.tzinfo is None:  # not local time, in which an hour may occur twice
        arrived = arrived.replace(tzinfo=UTC)
    return TraceRequest(arrived.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _read_mooncake(row: Mapping[str, Any]) -> TraceRequest:
    return TraceRequest(
        float(row["timestamp"]) / 1000,
        int(row["input_length"]),
        int(row["output_length"]),
        tuple(map(int, row.get("hash_ids", ()))),
    )


def _read_own(row: Mapping[str, Any]) -> TraceRequest:
    session = row.get("session")
    return TraceRequest(
        float(row["arrival_s"]),
        int(row["input_tokens"]),
        int(row["output_tokens"]),
        session=None if session in (None, "") else str(session),
    )


# By the column that only this form has.
_FORMS: dict[str, Callable[[Mapping[str, Any]], TraceRequest]] = {
    "TIMESTAMP": _read_azure,
    "timestamp": _read_mooncake,
    "arrival_s": _read_own,
}
