"""Two ranks with their state on the device and their steps in graphs, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minisrv.engine.device_runner import DeviceRunner
from tests.gpu.test_gpu_ranks import VOCAB_SIZE, TwoRanks, assert_greedy
from tests.support.device_parts import use_device_runner
from tests.support.half_models import save_checkpoint
from tests.support.step_driver import open_engine

CPU = torch.device("cpu")


@pytest.mark.parametrize("in_graphs", [False, True])
def test_two_ranks_give_the_tokens_of_transformers(
    in_graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of the vocabulary differ in size."""
    repeat = use_device_runner(monkeypatch)
    path = save_checkpoint(tmp_path / "model", "qwen3", 64, torch.float32, vocab_size=VOCAB_SIZE)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    options = {"cuda_graph_ranks": in_graphs, "cuda_graph_max_tokens": 64}
    engine = TwoRanks(path, CPU, run_dir, **options)
    recorded = repeat.replays
    assert_greedy(path, engine, CPU)
    assert (repeat.replays - recorded >= 2 * 2 * 19) == in_graphs


def test_an_engine_that_is_closed_has_no_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_device_runner(monkeypatch)
    path = save_checkpoint(tmp_path, "qwen3", 64, torch.float32)
    engine = open_engine(path, device="cpu", num_pages=400, cuda_graph_max_bs=2)
    runner = engine._rank_0.runner
    assert isinstance(runner, DeviceRunner)
    assert runner._graphs
    engine.close()
    assert not runner._graphs
    assert not runner._samplers
