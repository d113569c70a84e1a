"""The figures of a run: throughput, latencies, failures, goodput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minisrv.bench.client import Outcome
from minisrv.bench.runner import Run
from minisrv.errors import ConfigError

# In seconds. ttft: from sending to the first chunk with output. itl: between two chunks with
# output. tpot: from the first chunk to the last, for each token after the first. e2e: from sending
# to the end of the stream.
LATENCIES = ("ttft", "itl", "tpot", "e2e")
PERCENTILES = (50, 90, 95, 99)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bounds:
    """A request is good if none of its latencies is longer, in seconds. itl: the longest of all."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Bounds:
        """Of "ttft:500", in milliseconds. Raises ConfigError."""
        limits = {}
        for text in texts:
            name, _, limit = text.partition(":")
            try:
                limits[name] = float(limit) / 1000
            except ValueError:
                limits[name] = -1.0
            if name not in LATENCIES or not limits[name] > 0:
                raise ConfigError(
                    f"{text} is not a bound such as ttft:500 (milliseconds); "
                    f"the names are {', '.join(LATENCIES)}"
                )
        return cls(limits)

    def hold(self, outcome: Outcome) -> bool:
        """Whether a request that has not failed is good."""
        return all(
            max(latencies(outcome)[name], default=0.0) <= limit
            for name, limit in self.limits.items()
        )


def latencies(outcome: Outcome) -> dict[str, list[float]]:
    """The samples of one request that has not failed, by the names in LATENCIES."""
    times = outcome.chunk_s
    after_first = num_output_tokens(outcome) - 1
    return {
        "ttft": [times[0] - outcome.sent_s],
        "itl": np.diff(times).tolist(),
        "tpot": [(times[-1] - times[0]) / after_first] if after_first > 0 else [],
        "e2e": [outcome.end_s - outcome.sent_s],
    }


def num_output_tokens(outcome: Outcome) -> int:
    """By the server's usage; the chunks with output if it has sent none."""
    return len(outcome.chunk_s) if outcome.output_tokens is None else outcome.output_tokens


def summarize(run: Run, bounds: Bounds) -> Json:
    """All figures of a run as JSON; seconds, tokens, and rates per second.

    Latencies and tokens are those of completed requests.
    """
    completed = [outcome for outcome in run.outcomes if outcome.failure is None]
    wall_s = run.wall_s or float("inf")
    tokens = _tokens(completed)
    num_chunks = sum(len(outcome.chunk_s) for outcome in run.outcomes)
    figures: Json = {
        "wall_s": run.wall_s,
        "interrupted": run.interrupted,
        "requests": {
            "completed": len(completed),
            "failed": _failures(run.outcomes),
            "unsent": run.unsent,
            "shorter_than_asked": sum(
                num_output_tokens(outcome) < outcome.wanted_tokens for outcome in completed
            ),
            "without_usage": sum(outcome.output_tokens is None for outcome in completed),
        },
        "tokens": tokens,
        "rates": {
            "requests": len(completed) / wall_s,
            "output_tokens": tokens["output"] / wall_s,
            "prompt_tokens": tokens["prompt"] / wall_s,
        },
        "latencies": {name: describe(values) for name, values in _samples(completed).items()},
        "client": {
            "late_s": describe([outcome.sent_s - outcome.planned_s for outcome in run.outcomes]),
            "cpu_s": run.cpu_s,
            "cpu_s_per_chunk": run.cpu_s / num_chunks if num_chunks else None,
        },
    }
    if bounds.limits:
        good = sum(map(bounds.hold, completed))
        figures["goodput"] = {
            "bounds_s": dict(bounds.limits),
            "requests": good,
            "rate": good / wall_s,
            "share": good / len(run.outcomes) if run.outcomes else None,
        }
    return figures


def describe(values: Sequence[float]) -> Json:
    """Count, mean, extremes and percentiles (between samples: linear); `curve`: 0 % to 100 %."""
    if not len(values):
        return {"count": 0}
    curve = np.percentile(values, range(101)).tolist()
    return {
        "count": len(values),
        "mean": float(np.mean(values)),
        "min": curve[0],
        **{f"p{percentile}": curve[percentile] for percentile in PERCENTILES},
        "max": curve[100],
        "curve": curve,
    }


def request_rows(run: Run) -> list[Json]:
    """One object for each request, in the order of sending; seconds since the first."""
    outcomes = sorted(run.outcomes, key=lambda outcome: outcome.sent_s)
    return [_row(outcome, outcomes[0].sent_s) for outcome in outcomes]


def _row(outcome: Outcome, start_s: float) -> Json:
    row: Json = {
        "sent_s": round(outcome.sent_s - start_s, 6),
        "ttft_s": None,
        "e2e_s": round(outcome.end_s - outcome.sent_s, 6),
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
        "chunks": len(outcome.chunk_s),
    }
    if outcome.chunk_s:
        row["ttft_s"] = round(outcome.chunk_s[0] - outcome.sent_s, 6)
    if outcome.failure is not None:
        row["failure"] = outcome.failure.kind
        row["message"] = outcome.failure.message
    return row


def _samples(completed: Sequence[Outcome]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for outcome in completed:
        for name, values in latencies(outcome).items():
            samples[name] += values
    return samples


def _tokens(completed: Sequence[Outcome]) -> Json:
    return {
        "prompt": sum(outcome.prompt_tokens or 0 for outcome in completed),
        "cached": sum(outcome.cached_tokens or 0 for outcome in completed),
        "output": sum(map(num_output_tokens, completed)),
        "chunks": sum(len(outcome.chunk_s) for outcome in completed),
    }


def _failures(outcomes: Iterable[Outcome]) -> Json:
    """By kind: how many, and what the first of them said."""
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    counts = Counter(failure.kind for failure in failures)
    messages = {failure.kind: failure.message for failure in reversed(failures)}
    return {
        kind: {"count": count, "message": messages[kind]} for kind, count in counts.most_common()
    }
