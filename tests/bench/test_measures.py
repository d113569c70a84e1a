"""The figures of a run are what its outcomes say; numpy is the oracle of the percentiles."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisrv.bench.client import Outcome
from minisrv.bench.measures import Bounds, describe, request_rows, summarize
from minisrv.bench.reply import Failure
from minisrv.bench.runner import Run
from minisrv.errors import ConfigError

SECONDS = st.floats(0, 1000, allow_nan=False)


def outcome(sent_s: float, *chunk_s: float, end_s: float = 0, tokens: int | None = None) -> Outcome:
    return Outcome(
        *(sent_s, sent_s, 4),
        end_s=end_s or chunk_s[-1],
        chunk_s=array("d", chunk_s),
        prompt_tokens=10,
        cached_tokens=2,
        output_tokens=tokens,
    )


OUTCOMES = [
    outcome(0.0, 0.5, 0.6, 0.9, end_s=1.0, tokens=4),  # several tokens in a chunk
    outcome(1.0, 1.1, end_s=1.2, tokens=1),
    outcome(1.0, 1.25, 1.5, end_s=2.0),
]


def failed(kind: str, message: str) -> Outcome:
    return Outcome(1.0, 1.5, 4, end_s=3.0, failure=Failure(kind, message))


def test_latencies_of_completed_requests() -> None:
    run = Run([*OUTCOMES, failed("status 503", "full")], 2.0, 0.1, 0)
    found = summarize(run, Bounds({}))["latencies"]
    assert found["ttft"]["mean"] == pytest.approx((0.5 + 0.1 + 0.25) / 3)
    assert found["itl"]["count"] == 3
    assert found["itl"]["max"] == pytest.approx(0.3)
    assert found["tpot"]["count"] == 2
    assert found["tpot"]["min"] == pytest.approx(0.4 / 3)
    assert found["e2e"]["max"] == pytest.approx(1.0)


def test_counts_and_rates() -> None:
    failures = [failed("status 503", "full"), failed("timeout", ""), failed("status 503", "later")]
    figures = summarize(Run([*OUTCOMES, *failures], 2.0, 0.12, 5), Bounds({}))
    assert figures["requests"] == {
        "completed": 3,
        "failed": {
            "status 503": {"count": 2, "message": "full"},
            "timeout": {"count": 1, "message": ""},
        },
        "unsent": 5,
        "shorter_than_asked": 2,
        "without_usage": 1,
    }
    assert figures["tokens"] == {"prompt": 30, "cached": 6, "output": 7, "chunks": 6}
    assert figures["rates"] == {"requests": 1.5, "output_tokens": 3.5, "prompt_tokens": 15.0}
    assert figures["client"]["cpu_s_per_chunk"] == pytest.approx(0.02)
    assert figures["client"]["late_s"]["max"] == 0.5
    assert "goodput" not in figures


def test_goodput_counts_requests_within_all_bounds() -> None:
    run = Run([*OUTCOMES, failed("status 503", "")], 2.0, 0.1, 0)
    good = summarize(run, Bounds.parse(["ttft:300", "itl:250.1"]))["goodput"]
    assert good == {
        "bounds_s": {"ttft": 0.3, "itl": 0.2501},
        "requests": 2,
        "rate": 1.0,
        "share": 0.5,
    }


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "p99:5", ":5"])
def test_a_wrong_bound_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a bound such as ttft:500"):
        Bounds.parse([text])


@given(st.lists(SECONDS, min_size=1))
def test_percentiles(values: list[float]) -> None:
    found = describe(values)
    for name, percentile in {
        "min": 0,
        "p50": 50,
        "p90": 90,
        "p95": 95,
        "p99": 99,
        "max": 100,
    }.items():
        assert found[name] == np.percentile(values, percentile)
    assert found["mean"] == pytest.approx(sum(values) / len(values))
    assert found["curve"] == sorted(found["curve"])


def test_a_run_without_outcomes_has_figures() -> None:
    figures = summarize(Run([], 0.0, 0.0, 3, interrupted=True), Bounds.parse(["ttft:1"]))
    assert figures["rates"]["requests"] == 0
    assert figures["latencies"]["ttft"] == {"count": 0}
    assert request_rows(Run([], 0.0, 0.0, 3)) == []


def test_each_request_has_a_row() -> None:
    late = outcome(0.5, 0.75, tokens=1)
    rows = request_rows(Run([failed("timeout", "no end"), late], 2.0, 0.1, 0))
    assert rows == [
        {
            "sent_s": 0.0,
            "ttft_s": 0.25,
            "e2e_s": 0.25,
            "prompt_tokens": 10,
            "cached_tokens": 2,
            "output_tokens": 1,
            "chunks": 1,
        },
        {
            "sent_s": 1.0,
            "ttft_s": None,
            "e2e_s": 1.5,
            "prompt_tokens": None,
            "cached_tokens": None,
            "output_tokens": None,
            "chunks": 0,
            "failure": "timeout",
            "message": "no end",
        },
    ]
