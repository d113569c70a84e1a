"""The throughput benchmark: its workload, its ideal, and a run of the whole script on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import make_checkpoint

BENCHMARK = Path(__file__).parent.parent / "benchmark"
CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield
    for name in ("offline_throughput", "roofline", "step_timing", "continuous_batching_peer"):
        sys.modules.pop(name, None)


def test_the_workload_is_that_of_the_ancestors() -> None:
    import offline_throughput

    requests = offline_throughput.make_requests()
    assert len(requests) == 256
    assert sum(len(prompt) for prompt, _ in requests) == 142_827
    assert sum(count for _, count in requests) == 133_966
    few = offline_throughput.make_requests(4, 0.1)
    assert [len(prompt) for prompt, _ in few] == [len(p) // 10 for p, _ in requests[:4]]


@pytest.mark.parametrize(
    ("directory", "tokens_per_second"),
    [
        (BENCHMARK / "models/Qwen3-0.6B", 35_460),
        (BENCHMARK / "models/Qwen3-8B", 12_380),
        (BENCHMARK / "models/Qwen3-14B", 7_900),
        (CONFIGS / "Llama-3.1-8B", 12_970),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_ideal_is_that_of_an_independent_calculation(
    directory: Path, tokens_per_second: int
) -> None:
    """The figures are of an H200: 4.3 TB/s in copies, 790 TFLOP/s."""
    import offline_throughput
    import roofline
    from minisrv.checkpoint.model_config import load_model_config

    lengths = [(len(prompt), count) for prompt, count in offline_throughput.make_requests()]
    found = roofline.ideal(
        load_model_config(directory), lengths, roofline.Rates(bandwidth=4.3e12, flops=790e12)
    )
    assert found.tokens_per_second == pytest.approx(tokens_per_second, rel=0.02)


def test_a_step_reads_only_the_experts_that_its_tokens_pick() -> None:
    import roofline
    from minisrv.checkpoint.model_config import load_model_config

    model = load_model_config(CONFIGS / "Qwen3-30B-A3B")
    rates = roofline.Rates(bandwidth=1.0, flops=1e30)
    one, many = (roofline.decode_step(model, batch, 0, rates)[0] for batch in (1, 1000))
    assert one == pytest.approx(2 * 3.04e9, rel=0.01)
    assert many == pytest.approx(2 * (30.53e9 - 151936 * 2048), rel=0.001)


def test_rates_are_measured_on_random_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import roofline

    operands: list[torch.Tensor] = []

    def best(device: torch.device, run: Any) -> float:
        operands.append(run.args[0])
        return 1.0

    monkeypatch.setattr(roofline, "_best", best)
    rates = roofline.measure_rates(torch.device("cpu"))
    assert (rates.bandwidth, rates.flops) == (2.0 * 2**26, 2.0 * 1024**3)
    assert len(operands) == 3
    for operand in operands:
        assert len(operand.flatten()[:4096].unique()) > 200


@pytest.mark.soak
def test_the_whole_script_runs_on_a_cpu_with_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import offline_throughput

    directory = make_checkpoint(tmp_path / "tiny", "qwen3")
    page = tmp_path / "page.md"
    arguments = ["--models", str(directory), "--requests", "6", "--scale", "0.05"]
    arguments += ["--device", "cpu", "--threads", "1", "--results", str(page)]
    monkeypatch.setattr(sys, "argv", ["offline_throughput.py", *arguments])
    assert offline_throughput.main() == 0
    text = page.read_text()
    assert text == capsys.readouterr().out
    expected = offline_throughput.make_requests(6, 0.05)
    assert f"{sum(len(p) for p, _ in expected):,} tokens in" in text
    assert f"{sum(count for _, count in expected):,} out" in text
    row = next(line for line in text.splitlines() if line.startswith("| tiny |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    rate, ideal, share, peer, faster, host_50, host_99 = (
        float(cell.replace(",", "")) for cell in cells[1:8]
    )
    assert 0 < rate < ideal
    assert share == pytest.approx(rate / ideal, abs=0.01)
    assert faster == pytest.approx(rate / peer, rel=0.05)
    assert 0 < host_50 <= host_99
    assert cells[8:] == ["n/a"] * 3
