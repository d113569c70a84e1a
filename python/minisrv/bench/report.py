"""The table of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from minisrv.bench.measures import LATENCIES, Json

MEANINGS = {
    "ttft": "time to first token",
    "itl": "between chunks",
    "tpot": "per output token",
    "e2e": "end to end",
}
_BUSY_SHARE = 0.8
_LATE_S = 0.05


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first row is the head, the first column is on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def describe_point(point: Json) -> str:
    """One point of load in full: counts, rates, warnings, a table of latencies."""
    requests, tokens, rates = point["requests"], point["tokens"], point["rates"]
    lines = [
        f"{load_name(point)}: {requests['completed']} requests completed in "
        f"{point['wall_s']:.2f} s",
        f"  {rates['requests']:.2f} requests/s, {rates['output_tokens']:.1f} output tokens/s, "
        f"{rates['prompt_tokens']:.1f} prompt tokens/s",
        f"  {tokens['prompt']} prompt tokens ({tokens['cached']} cached), "
        f"{tokens['output']} output tokens",
    ]
    if "goodput" in point:
        lines.append(f"  {_goodput(point['goodput'])}")
    lines += [f"  {line}" for line in warnings(point)]
    return "\n".join([*lines, "", _latency_table(point), ""])


def describe_sweep(points: Sequence[Json]) -> str:
    """A row for each point of load."""
    head = ["load", "failed", "req/s", "output tok/s", "TTFT p50", "TTFT p99", "TPOT p50"]
    head += ["ITL p99", "E2E p50", "E2E p99"]
    goodput = any("goodput" in point for point in points)
    rows = [[*head, *(["good req/s"] if goodput else [])]]
    for point in points:
        rates, found = point["rates"], point["latencies"]
        row = [load_name(point), str(num_failed(point)), f"{rates['requests']:.2f}"]
        row.append(f"{rates['output_tokens']:.1f}")
        row += [_ms(found["ttft"].get(key)) for key in ("p50", "p99")]
        row += [_ms(found["tpot"].get("p50")), _ms(found["itl"].get("p99"))]
        row += [_ms(found["e2e"].get(key)) for key in ("p50", "p99")]
        if goodput:
            row.append(f"{point['goodput']['rate']:.2f}")
        rows.append(row)
    return f"{format_table(rows)}\n\nLatencies in milliseconds."


def num_failed(point: Json) -> int:
    """Requests that failed, for whatever reason."""
    return sum(failure["count"] for failure in point["requests"]["failed"].values())


def load_name(point: Json) -> str:
    """What the point offered to the server."""
    load = point["load"]
    if load["concurrency"] is not None:
        return f"concurrency {load['concurrency']}"
    if load["rate"] is not None:
        return f"{load['rate']:g} requests/s"
    return "as recorded"


def warnings(point: Json) -> list[str]:
    """What a reader of the figures has to know, one line each."""
    requests, tokens, client = point["requests"], point["tokens"], point["client"]
    lines = [
        f"failed: {failure['count']} x {kind}{': ' * bool(failure['message'])}{failure['message']}"
        for kind, failure in requests["failed"].items()
    ]
    if requests["unsent"]:
        lines.append(f"not sent: {requests['unsent']} requests")
    if requests["shorter_than_asked"]:
        lines.append(f"{requests['shorter_than_asked']} replies were shorter than asked for")
    if requests["without_usage"]:
        lines.append(
            f"{requests['without_usage']} replies came without usage, so their chunks were "
            "counted as tokens"
        )
    if tokens["chunks"] and tokens["output"] != tokens["chunks"]:
        lines.append(
            f"{tokens['output'] / tokens['chunks']:.2f} tokens per chunk: ITL is the time "
            "between chunks, and TPOT the time for each token"
        )
    if client["cpu_s"] > _BUSY_SHARE * point["wall_s"] > 0:
        share = client["cpu_s"] / point["wall_s"]
        lines.append(f"this client used {share:.0%} of a core, so latencies are too high")
    if client["late_s"].get("p99", 0) > _LATE_S:
        lines.append(f"requests were sent late: p99 {_ms(client['late_s']['p99'])} ms")
    return lines


def _goodput(goodput: Json) -> str:
    bounds = ", ".join(f"{name} {_ms(limit)} ms" for name, limit in goodput["bounds_s"].items())
    share = "" if goodput["share"] is None else f" ({goodput['share']:.1%} of all)"
    return f"goodput: {goodput['rate']:.2f} requests/s{share} within {bounds}"


def _latency_table(point: Json) -> str:
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    rows = [["milliseconds", *columns]]
    for name in LATENCIES:
        found = point["latencies"][name]
        label = f"{name.upper()} ({MEANINGS[name]})"
        rows.append([label, *(_ms(found.get(column)) for column in columns)])
    return format_table(rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f}"
