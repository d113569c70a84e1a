"""Two results of `minisrv bench` side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from minisrv.bench.measures import Json
from minisrv.bench.report import format_table, load_name, num_failed
from minisrv.errors import ConfigError

# Name, where it is in a point, and what it is multiplied with.
_ROWS: tuple[tuple[str, Callable[[Json], float | None], float], ...] = (
    ("requests/s", lambda point: point["rates"]["requests"], 1),
    ("output tokens/s", lambda point: point["rates"]["output_tokens"], 1),
    ("good requests/s", lambda point: point.get("goodput", {}).get("rate"), 1),
    ("failed requests", num_failed, 1),
    ("TTFT p50, ms", lambda point: point["latencies"]["ttft"].get("p50"), 1000),
    ("TTFT p99, ms", lambda point: point["latencies"]["ttft"].get("p99"), 1000),
    ("ITL p50, ms", lambda point: point["latencies"]["itl"].get("p50"), 1000),
    ("ITL p99, ms", lambda point: point["latencies"]["itl"].get("p99"), 1000),
    ("TPOT p50, ms", lambda point: point["latencies"]["tpot"].get("p50"), 1000),
    ("E2E p50, ms", lambda point: point["latencies"]["e2e"].get("p50"), 1000),
    ("E2E p99, ms", lambda point: point["latencies"]["e2e"].get("p99"), 1000),
)
# They say who measured and where the result went, not what was measured.
_OWN_OPTIONS = ("url", "model")


def read_result(path: Path) -> Json:
    """What --output wrote. Raises ConfigError."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not {"points", "options", "model"} <= result.keys():
        raise ConfigError(f"{path} is not a result of minisrv bench --output")
    return result


def compare(first: Json, second: Json) -> str:
    """A table for each load that both have measured, preceded by the options that differ.

    Raises ConfigError if they have no load in common, or lack figures.
    """
    try:
        return _compare(first, second)
    except (LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"one of the results is not in the form of --output: {error!r}") from None


def _compare(first: Json, second: Json) -> str:
    seconds = {load_name(point): point for point in second["points"]}
    pairs = [
        (name, point, seconds[name])
        for point in first["points"]
        if (name := load_name(point)) in seconds
    ]
    if not pairs:
        raise ConfigError("the two results have no load in common")
    lines = [f"A: {_describe(first)}", f"B: {_describe(second)}", *_differences(first, second), ""]
    for name, a, b in pairs:
        lines += [_table(name, a, b), ""]
    return "\n".join(lines[:-1])


def _describe(result: Json) -> str:
    return f"{result['options']['url']}, model {result['model']}, {result['started_at']}"


def _differences(first: Json, second: Json) -> list[str]:
    a, b = first["options"], second["options"]
    return [
        f"--{name.replace('_', '-')} differs: {a.get(name)} and {b.get(name)}"
        for name in sorted(a.keys() | b.keys())
        if name not in _OWN_OPTIONS and a.get(name) != b.get(name)
    ]


def _table(name: str, first: Json, second: Json) -> str:
    rows = [[name, "A", "B", "B/A"]]
    for label, value_of, factor in _ROWS:
        a, b = value_of(first), value_of(second)
        if a is None or b is None:
            continue
        ratio = f"{b / a:.3f}" if a else "-"
        rows.append([label, f"{a * factor:.2f}", f"{b * factor:.2f}", ratio])
    return format_table(rows)
