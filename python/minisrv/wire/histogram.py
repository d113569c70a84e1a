"""Histograms of the metrics and their buckets; `frontend.ops.metrics` has their names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from minisrv.wire.messages import Histogram

# From 1 ms to 2 min: a small model on a fast device answers in single milliseconds.
SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0),
)
TOKENS = tuple(2**i for i in range(18))


class HistogramCounter:
    """Counts values into buckets, many equal ones at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def count_value(self, value: float, count: int = 1) -> None:
        """Count a value `count` times; a bucket holds the values up to its bound."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def message(self) -> Histogram:
        return Histogram(counts=np.array(self._counts, np.int64), total=self._total)
