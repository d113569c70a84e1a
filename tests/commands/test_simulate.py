"""`minisrv simulate`: from a trace file to a table and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisrv.commands import cli

ROOT = Path(__file__).parent.parent.parent
MODEL = str(ROOT / "benchmark/models/Qwen3-8B")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Forty requests in Mooncake's form, all of which begin with the same block."""
    path = tmp_path / "trace.jsonl"
    rows = [
        {
            "timestamp": 200 * n,
            "input_length": 1500,
            "output_length": 20,
            "hash_ids": [0, n, 100 + n],
        }
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_trace_gives_a_table_and_figures(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = trace.with_suffix(".figures.json")
    command = ["simulate", MODEL, "--gpu", "H100", "--trace", str(trace), "--json", str(figures)]
    assert cli.main(command) == 0
    result = json.loads(figures.read_text())
    assert result["requests"] == 40
    assert result["refused"] == 0
    assert result["hit_rate"] == pytest.approx(39 * 512 / (40 * 1500))
    assert 0.005 < result["itl_p50"] < 0.03
    assert result["good_share"] == 1
    printed = capsys.readouterr().out
    assert "H100 80GB" in printed
    assert "100.0% of requests" in printed
    slower = [*command, "--efficiency", "0.35", "--duration", "4"]
    assert cli.main(slower) == 0
    assert json.loads(figures.read_text())["requests"] == 20
    assert json.loads(figures.read_text())["itl_p50"] > 1.5 * result["itl_p50"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H101"], "known GPUs"),
        (["--gpu", "L4", "--max-seq-len", "40960", "--dtype", "float32"], "does not fit"),
        (["--gpu", "H100", "--trace", "missing.jsonl"], "cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    trace: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", MODEL, "--trace", str(trace), *options]) == 2
    assert message in capsys.readouterr().err
