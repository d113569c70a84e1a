"""The memory that the system reports as available, and the step that measures a GPU's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from minisrv.config import ServerConfig
from minisrv.engine import rank_engine
from minisrv.engine.cuda_memory import largest_batch
from minisrv.engine.memory import available_memory
from tests.support.checkpoints import make_checkpoint
from tests.support.step_driver import open_engine


def test_available_memory_is_the_kernels_estimate(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16384 kB\nMemFree: 64 kB\nMemAvailable:    1024 kB\n")
    assert available_memory(meminfo) == 1024 * 1024


def test_without_an_estimate_half_of_the_physical_memory_counts(tmp_path: Path) -> None:
    without = tmp_path / "meminfo"
    without.write_text("MemTotal:       16384 kB\n")
    assert available_memory(without) == available_memory(tmp_path / "missing") > 2**20
    assert available_memory() < 2 * available_memory(without)


def test_the_largest_step_has_penalties_in_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(step: Callable[[], object]) -> int:
        step()
        return 1

    monkeypatch.setattr(rank_engine, "measure_workspace", run)
    path = make_checkpoint(tmp_path, "llama")
    rank = open_engine(path, max_running_requests=5, max_prefill_tokens=20)._rank_0
    config = ServerConfig(max_running_requests=5, page_size=rank._pool.page_size)
    assert rank._measure_largest_step(config) == 1
    counts_RV = rank.runner._adjuster.counts_RV
    assert rank.memory_plan.token_counts == counts_RV.nbytes == 5 * 384 * 2
    assert counts_RV[:, 0].eq(1).logical_or(counts_RV[:, 0].eq(-1)).all()
    assert counts_RV.count_nonzero(1).le(2).all()


def test_the_largest_step_masks_the_samples_of_rank_0() -> None:
    first, second = (
        largest_batch(3, 12, 4, 100, on_rank_0=on_rank_0) for on_rank_0 in (True, False)
    )
    grammar = first.sampling.grammar
    assert grammar is not None
    assert grammar.samples.tolist() == [0, 1, 2]
    assert grammar.fill().tolist() == [[-1] * 4] * 3
    assert second.sampling.grammar is None
