"""The comparison with other engines: its arithmetic, and a run of the program with minisrv only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest


def cells(page: str, row: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rates_are_of_medians_and_ratios_have_the_range_of_the_pairs(shape: Path) -> None:
    import peers
    from gguf_files import FileSize
    from minisrv.checkpoint.model_config import load_model_config
    from roofline import Rates

    size = FileSize(step_bytes=40_000_000, num_weights=64_000_000, kinds={"Q5_0": 1})
    results = peers.Results("one.gguf", size, {"minisrv": 3.0, "llama.cpp": 1.25})
    for ours, theirs in ((1.0, 4.0), (2.0, 2.0), (4.0, 6.0)):
        results.add("W3", "minisrv", ours)
        results.add("W3", "llama.cpp", theirs)
    results.add("W1 decode", "minisrv", 0.02)
    results.add("W1 decode", "llama.cpp", 0.04)
    model, rates = load_model_config(shape), Rates(bandwidth=2e9, flops=1e12)
    text = peers.table(results, model, rates)
    count = peers.tokens("W3")
    row = cells(text, "W3")
    assert row[1] == f"{count / 2:.1f} ({count / 4:.1f}-{count:.1f})"
    assert row[2] == f"{count / 4:.1f} ({count / 6:.1f}-{count / 2:.1f})"
    assert row[3] == "**2.00** (1.00-4.00)"
    assert cells(text, "W1 decode")[1:4] == [
        "50.0 (50.0-50.0)",
        "25.0 (25.0-25.0)",
        "**2.00** (2.00-2.00)",
    ]
    assert "Weights read in W1 decode, GB/s: minisrv 2.0, llama.cpp 1.0." in text
    assert "40 MB per decode step, 5.00 bits per weight (1 Q5_0)." in text
    assert "Seconds until ready: minisrv 3.0, llama.cpp 1.2." in text


def test_the_limit_counts_shared_tokens_once_and_smaller_weights_less(shape: Path) -> None:
    import peers
    from minisrv.checkpoint.model_config import load_model_config
    from roofline import Rates

    model = load_model_config(shape)
    slow_memory, slow_products = Rates(1e6, 1e30), Rates(1e30, 1e9)
    small, large = (peers.limit("W1 decode", model, size, slow_memory) for size in (1, 2))
    layer = 2 * 64 * 4 * 128 + 2 * 64 * 2 * 128 + 3 * 64 * 96 + 2 * (64 + 128)
    num_weights = 7168 * 64 + 2 * layer + 64
    assert large - small == pytest.approx(num_weights / slow_memory.bandwidth)
    cold, warm = (peers.limit(row, model, 2, slow_products) for row in ("W4", "W4 warm"))
    one = peers.limit("W2", model, 2, slow_products)
    assert cold - warm == pytest.approx(one, rel=0.1)
    assert warm < one


def test_each_engine_gets_the_files_that_it_reads(bench_model: Path) -> None:
    import peers

    given = argparse.Namespace(
        vllm="vllm", llama_server="llama", llama_flags="", openvino_python="python", threads=1
    )
    assert list(peers.engines(bench_model, given)) == ["minisrv", "vLLM", "llama.cpp"]
    assert (bench_model.parent / "bench-BF16.gguf").exists()
    assert list(peers.engines(Path("some.gguf"), given)) == ["minisrv", "llama.cpp", "OpenVINO"]


@pytest.mark.soak
def test_the_program_runs_with_only_minisrv(
    bench_model: Path,
    shape: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import peers

    page = tmp_path / "page.md"
    arguments = [str(bench_model), "--shape", str(shape), "--threads", "1"]
    arguments += ["--workloads", "W1", "W2", "W4", "--repetitions", "1", "--results", str(page)]
    monkeypatch.setattr(sys, "argv", ["benchmark/peers.py", *arguments])
    assert peers.main() == 0
    text = page.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    rates = {row: cells(text, row)[1] for row in ("W1", "W1 decode", "W2", "W4", "W4 warm")}
    assert all(float(cell.split()[0]) > 0 for cell in rates.values())
    assert all(0 < float(cells(text, row)[2]) < 2 for row in rates)
    assert f"`python benchmark/peers.py {' '.join(arguments)}`" in text
