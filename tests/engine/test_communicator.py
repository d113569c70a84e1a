"""Real gloo ranks, each in a thread: what they exchange, and what ends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minisrv.engine.parallel import communicator
from minisrv.engine.parallel.communicator import PeerFailedError, TPGroup
from minisrv.engine.parallel.shard import Sharding
from minisrv.engine.rank_engine import agree_on_pages
from minisrv.errors import ConfigError

CPU = torch.device("cpu")


def on_ranks(run_dir: Path, run: Callable[[TPGroup], Any], size: int = 2) -> list[Any]:
    """What `run` returns or raises on each rank."""
    results: list[Any] = [None] * size

    def follow(rank: int) -> None:
        try:
            results[rank] = run(TPGroup(Sharding(rank, size), run_dir, CPU))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for another"
    return results


class InOrder:
    """A gloo group that returns nothing for an operation in the current stream, as NCCL's does."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._group, name)

        def run(*arguments: Any) -> None:
            assert not arguments[-1].asyncOp
            operation(*arguments).wait()

        return run


def test_operations_stay_in_the_current_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = communicator._gloo_group
    monkeypatch.setattr(communicator, "_gloo_group", lambda *args: InOrder(make(*args)))

    def run(group: TPGroup) -> list[Any]:
        rank = group.sharding.rank
        shard = torch.arange(10.0).view(2, 5)[:, 2 * rank : 2 + 3 * rank]
        return [
            group.all_reduce(torch.tensor([1.0 + rank])).tolist(),
            group.broadcast(torch.tensor([7 + rank])).tolist(),
            group.all_reduce_min(5 - rank),
            group.gather_logits(shard, 5).tolist(),
        ]

    first, second = on_ranks(tmp_path, run)
    assert first[:3] == second[:3] == [[3.0], [7], 4]
    assert first[3] == torch.arange(10.0).view(2, 5).tolist()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_without_memory_ends_the_others_at_once(tmp_path: Path, failing: int) -> None:
    def run(group: TPGroup) -> int:
        def choose() -> int:
            if group.sharding.rank == failing:
                raise ConfigError("no room for a page")
            return 100

        return agree_on_pages(group, choose)

    began = time.monotonic()
    results = on_ranks(tmp_path, run, size=3)
    assert time.monotonic() - began < 30
    assert isinstance(results.pop(failing), ConfigError)
    assert [type(result) for result in results] == [PeerFailedError] * 2


def test_the_ranks_agree_on_the_least_number_of_pages(tmp_path: Path) -> None:
    run = lambda group: agree_on_pages(group, lambda: 100 + group.sharding.rank)  # noqa: E731
    assert on_ranks(tmp_path, run) == [100, 100]


def test_an_aborted_group_refuses_what_would_wait_for_a_dead_rank(tmp_path: Path) -> None:
    def run(group: TPGroup) -> None:
        group.abort()
        group.all_reduce(torch.ones(1))

    for result in on_ranks(tmp_path, run):
        assert isinstance(result, RuntimeError)
        assert "a rank has died" in str(result)
