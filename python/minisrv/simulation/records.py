"""When each request of a simulation arrived, began and ended, and the figures that follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minisrv.wire.messages import DetokenizeMsg

Float64Array = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request must keep to count as good: seconds to its first token, and mean seconds
    between its tokens.
    """

    ttft_s: float
    itl_s: float


class Records:
    """Columns by uid, 0 to N - 1, of all replicas. A time that has not come is NaN."""

    def __init__(self, arrivals: Float64Array, request_s: float = 0.0) -> None:
        """arrivals: [N] seconds. request_s: from the scheduler's token to the client."""
        count = len(arrivals)
        self.arrived_at = arrivals
        self.first_at = np.full(count, np.nan)
        self.last_at = np.full(count, np.nan)
        self.output_tokens = np.zeros(count, np.int64)
        self.prompt_tokens = np.zeros(count, np.int64)
        self.cached_tokens = np.zeros(count, np.int64)
        self.ended = np.zeros(count, np.bool_)
        self.refused: list[int] = []
        self._gaps: list[Float64Array] = []
        self._request_s = request_s

    def take(self, message: DetokenizeMsg) -> None:
        """Note the tokens of a settled step."""
        at, uids = message.at + self._request_s, message.uids
        gaps = at - self.last_at[uids]
        self._gaps.append(gaps)
        self.last_at[uids] = at
        self.output_tokens[uids] += 1
        for start in message.starts:
            self.first_at[start.uid] = at
            self.prompt_tokens[start.uid] = start.prompt_tokens
            self.cached_tokens[start.uid] = start.cached_tokens
        if message.finishes.any():
            self.ended[uids[message.finishes > 0]] = True
        self.refused += [failure.uid for failure in message.failures]

    def inter_token_s(self) -> Float64Array:
        """The seconds between any two tokens that follow each other, of all requests."""
        gaps: Float64Array = np.concatenate([*self._gaps, np.empty(0)])
        return gaps[~np.isnan(gaps)]

    def good(self, bounds: Bounds) -> BoolArray:
        """[N] which requests ended within the bounds."""
        following = np.maximum(self.output_tokens - 1, 1)
        mean_itl = (self.last_at - self.first_at) / following
        good: BoolArray = self.ended & (mean_itl <= bounds.itl_s)
        return good & (self.first_at - self.arrived_at <= bounds.ttft_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The result of a simulation; times in seconds, rates per second of virtual time.

    hit_rate: the share of prompt tokens found in a cache. busy: the mean share of the time in
    which an engine computes. goodput: requests per second within the bounds.
    good_share: of all requests.
    """

    requests: int
    refused: int
    seconds: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_p50: float
    itl_p90: float
    itl_p99: float
    hit_rate: float
    preemptions: int
    busy: float
    output_rate: float
    goodput: float
    good_share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def figures(records: Records, bounds: Bounds, *, preemptions: int, busy_s: float) -> Figures:
    """Sum up a simulation that has ended. busy_s: the mean of the replicas."""
    ttft = records.first_at - records.arrived_at
    ttft = ttft[~np.isnan(ttft)]
    seconds = float(np.nanmax(records.last_at, initial=0.0)) or 1.0
    good = int(records.good(bounds).sum())
    ttfts, itls = _percentiles(ttft), _percentiles(records.inter_token_s())
    return Figures(
        requests=len(records.arrived_at),
        refused=len(records.refused),
        seconds=seconds,
        **{f"ttft_p{p}": value for p, value in zip(_PERCENTILES, ttfts, strict=True)},
        **{f"itl_p{p}": value for p, value in zip(_PERCENTILES, itls, strict=True)},
        hit_rate=float(records.cached_tokens.sum() / max(1, records.prompt_tokens.sum())),
        preemptions=preemptions,
        busy=busy_s / seconds,
        output_rate=float(records.output_tokens.sum()) / seconds,
        goodput=good / seconds,
        good_share=good / len(records.arrived_at),
    )


def _percentiles(values: Float64Array) -> list[float]:
    if not len(values):
        return [0.0] * len(_PERCENTILES)
    return [float(value) for value in np.percentile(values, _PERCENTILES)]
