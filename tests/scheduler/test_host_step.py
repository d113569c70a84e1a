"""The micro-benchmarks of the host's time measure what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

MICRO = Path(__file__).parent.parent.parent / "benchmark" / "micro"


@pytest.mark.parametrize("batch", [1, 64])
def test_the_benchmark_measures_steps_that_serve_requests(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MICRO))
    import host_step

    timings, clients = host_step.run(batch, 600)
    assert len(timings.decodes) == 600
    assert clients.num_finished > 0  # each has been held to the number of tokens it asked for
    assert len(clients.wanted) >= batch - 1
    sys.modules.pop("host_step")


@pytest.mark.parametrize("event", ["nothing", "eviction", "pins"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_benchmark_of_a_long_queue_keeps_the_requests_waiting(
    event: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MICRO))
    import long_queue

    assert len(long_queue.measure(4, 20, event, shared=shared)) == 20
    sys.modules.pop("long_queue")
