"""Two results are compared load by load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minisrv.bench.client import Outcome
from minisrv.bench.compare import compare, read_result
from minisrv.bench.load import Load
from minisrv.bench.measures import Bounds, summarize
from minisrv.bench.runner import Run
from minisrv.errors import ConfigError
from tests.bench.test_measures import OUTCOMES, failed


def result(outcomes: list[Outcome], wall_s: float, *loads: Load, seed: int = 0) -> dict[str, Any]:
    figures = summarize(Run(outcomes, wall_s, 0.1, 0), Bounds({}))
    return {
        "model": "m",
        "started_at": "then",
        "options": {"url": "http://127.0.0.1:8000", "seed": seed},
        "points": [{"load": load.to_json(), **figures} for load in loads],
    }


def test_common_loads_are_compared() -> None:
    first = result(OUTCOMES, 2.0, Load(1), Load(4))
    second = result([*OUTCOMES, failed("timeout", "")], 4.0, Load(4), Load(8), seed=3)
    text = compare(first, second)
    rows = [line.split() for line in text.splitlines()]
    assert ["concurrency", "4", "A", "B", "B/A"] in rows
    assert ["requests/s", "1.50", "0.75", "0.500"] in rows
    assert ["failed", "requests", "0.00", "1.00", "-"] in rows
    assert ["TTFT", "p50,", "ms", "250.00", "250.00", "1.000"] in rows
    assert "--seed differs: 0 and 3" in text
    assert "concurrency 1" not in text
    assert "concurrency 8" not in text


def test_results_without_a_common_load_are_refused() -> None:
    with pytest.raises(ConfigError, match="no load in common"):
        compare(result(OUTCOMES, 2.0, Load(1)), result(OUTCOMES, 2.0, Load(rate=1)))


def test_a_written_result_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result(OUTCOMES, 2.0, Load(1))))
    assert read_result(path)["points"][0]["load"]["concurrency"] == 1


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "not a result")]
)
def test_another_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_result(path)


def test_a_result_without_figures_is_refused() -> None:
    whole = result(OUTCOMES, 2.0, Load(1))
    for lacking in ({**whole, "options": []}, {**whole, "points": [{"load": Load(1).to_json()}]}):
        with pytest.raises(ConfigError, match="not in the form of --output"):
            compare(whole, lacking)
