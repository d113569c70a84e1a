"""Shows the progress of a benchmark: a bar in a terminal, otherwise a line for each load."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from minisrv.bench.client import Outcome
from minisrv.bench.measures import num_output_tokens


class Progress:
    """On stderr, for one point of load; a context."""

    def __init__(self, name: str, num_requests: int) -> None:
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            print(f"{name}: {num_requests} requests", file=sys.stderr, flush=True)
        self._bar = tqdm(
            total=num_requests, desc=name, unit="req", disable=not self._terminal, leave=False
        )
        self._started_s = time.perf_counter()
        self._tokens = self._failed = 0

    def report(self, outcome: Outcome) -> None:
        """One request has ended."""
        if not self._terminal:
            return
        self._failed += outcome.failure is not None
        self._tokens += num_output_tokens(outcome)
        rate = self._tokens / (time.perf_counter() - self._started_s)
        failed = f", {self._failed} failed" if self._failed else ""
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s{failed}", refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
