"""When each request of a simulation arrived, began and ended, and the figures that follow."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minisrv.scheduler.replies import Replies

Float64Array = np.ndarray[Any, np.dtype[np.float64]]
Int64Array = np.ndarray[Any, np.dtype[np.int64]]
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
    """Columns by uid, 0 to N - 1, of all replicas. Times are NaN until they are known."""

    def __init__(self, arrivals: Float64Array, request_s: float = 0.0) -> None:
        """arrivals: [N] seconds. request_s: from the scheduler's token to the client."""
        count = len(arrivals)
        self.arrived_at = arrivals
        self.first_at = np.full(count, np.nan)
        self.prompt_tokens = np.zeros(count, np.int64)
        self.cached_tokens = np.zeros(count, np.int64)
        self.ended = np.zeros(count, np.bool_)
        self.refused: list[int] = []
        # The uid of each token, and for each step how many tokens it has and when they came.
        self._token_uids = array("q")
        self._step_tokens, self._step_at = array("q"), array("d")
        self._request_s = request_s

    def take(self, replies: Replies, ends: Iterable[int], at: float) -> None:
        """Note the tokens of a step that is settled at `at`, the last ones of the uids `ends`."""
        at += self._request_s
        self._token_uids.extend(replies.uids)
        self._step_tokens.append(len(replies.uids))
        self._step_at.append(at)
        for start in replies.starts:
            self.first_at[start.uid] = at
            self.prompt_tokens[start.uid] = start.prompt_tokens
            self.cached_tokens[start.uid] = start.cached_tokens
        for uid in ends:
            self.ended[uid] = True
        self.refused += [failure.uid for failure in replies.failures]

    def output_tokens(self) -> Int64Array:
        """[N] how many each request has got."""
        return np.bincount(self._tokens()[0], minlength=len(self.arrived_at))

    def inter_token_s(self) -> Float64Array:
        """The seconds between any two tokens that follow each other, of all requests."""
        uids, at = self._tokens()
        order = np.argsort(uids, kind="stable")
        gaps: Float64Array = np.diff(at[order])[np.diff(uids[order]) == 0]
        return gaps

    def last_at(self) -> Float64Array:
        """[N] when the last token of each request came."""
        uids, at = self._tokens()
        last = np.full(len(self.arrived_at), np.nan)
        np.fmax.at(last, uids, at)
        return last

    def good(self, bounds: Bounds) -> BoolArray:
        """[N] which requests ended within the bounds."""
        following = np.maximum(self.output_tokens() - 1, 1)
        mean_itl = (self.last_at() - self.first_at) / following
        good: BoolArray = self.ended & (mean_itl <= bounds.itl_s)
        return good & (self.first_at - self.arrived_at <= bounds.ttft_s)

    def _tokens(self) -> tuple[Int64Array, Float64Array]:
        """The uid and the time of each token, in the order of the steps of each replica."""
        steps = np.array(self._step_at), np.array(self._step_tokens)
        return np.array(self._token_uids), np.repeat(*steps)


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
    seconds = float(np.nanmax(records.last_at(), initial=0.0)) or 1.0
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
        output_rate=float(records.output_tokens().sum()) / seconds,
        goodput=good / seconds,
        good_share=good / len(records.arrived_at),
    )


def _percentiles(values: Float64Array) -> list[float]:
    if not len(values):
        return [0.0] * len(_PERCENTILES)
    return [float(value) for value in np.percentile(values, _PERCENTILES)]
