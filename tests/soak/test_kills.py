"""Processes that are killed or stopped under load: no request is lost, and no text changes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from signal import SIGSTOP

import pytest
import uvloop

from tests.soak.kill_load import Fault, KillLoad, StartWatch, percentile, table
from tests.soak.real_requests import (
    make_requests,
    make_tool_checkpoint,
    run_uncut,
    stop_requests,
)
from tests.soak.scale import SEED, scaled
from tests.support.oracle import load_reference
from tests.support.server_process import ServerProcess

KINDS = ("scheduler", "detokenizer", "tokenizer", "frontend")
# From the death to the service, without what the process needs to start.
BACK_S = 2.0
OPTIONS: tuple[str, ...] = ("--dtype", "float32", "--num-threads", "1", "--kv-memory", "64MiB")
# Within one second, so that the deaths before do not lengthen the back-off.
OPTIONS += ("--restart-limit", "9/1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tool_checkpoint(tmp_path_factory.mktemp("models") / "tools")


def endure(
    checkpoint: Path,
    tmp_dir: Path,
    faults: Sequence[Fault],
    *options: str,
    seed: int = SEED,
    back_s: float = BACK_S,
) -> None:
    """Have a server suffer the faults under load.

    Raises AssertionError at whatever hangs, ends early or differs from the replies without faults,
    and if the median time until a process is back exceeds its first start by `back_s`, which shows
    something only on a machine that does nothing else.
    """
    rng = random.Random(f"{SEED} {seed}")
    arguments = ("--model", str(checkpoint), *OPTIONS, *options)
    server = ServerProcess(*arguments, tmp_dir=tmp_dir, hash_engine=False)
    try:
        starts = StartWatch(server)
        server.wait_until_ready()
        host, port = server.url.removeprefix("http://").split(":")
        address, model = (host, int(port)), load_reference(checkpoint)
        requests = make_requests(rng)
        uvloop.run(run_uncut(address, requests, model, rng))
        stops = stop_requests(requests[1])
        uvloop.run(run_uncut(address, stops, model, rng))
        load = KillLoad(server, [*requests, *stops], rng)
        uvloop.run(load.run(faults))
        print(f"\n{load.num_replies} replies as without faults; {len(load.differences)} others")
        print(table(load.seen, starts.result()))
        print(*load.differences, sep="\n")
        assert load.differences == []
        server.popen.terminate()
        assert server.wait() == 0, server.output[-2000:]
        server.assert_nothing_is_left()
    finally:
        server.end()
    for name, seen in load.seen.items():
        if name in KINDS:
            assert percentile(seen.ready_s, 50) - starts.result()[name] < back_s, name


@pytest.mark.soak
def test_a_few_deaths_and_stops_lose_nothing(checkpoint: Path, socket_dir: Path) -> None:
    faults = [*map(Fault, KINDS), Fault("scheduler", SIGSTOP)]
    endure(checkpoint, socket_dir, faults, "--stall-timeout", "4", back_s=math.inf)


@pytest.mark.soak
def test_each_process_is_killed_in_turn(checkpoint: Path, socket_dir: Path) -> None:
    endure(checkpoint, socket_dir, list(islice(map(Fault, cycle(KINDS)), scaled(100))))


@pytest.mark.soak
def test_processes_are_killed_at_random(checkpoint: Path, socket_dir: Path) -> None:
    rng = random.Random(f"{SEED} kinds")
    endure(checkpoint, socket_dir, [Fault(rng.choice(KINDS)) for _ in range(scaled(100))], seed=1)


@pytest.mark.soak
def test_processes_of_two_ranks_are_killed(checkpoint: Path, socket_dir: Path) -> None:
    kinds = cycle(("rank 1", "scheduler", "rank 1", "frontend", "detokenizer", "tokenizer"))
    faults = list(islice(map(Fault, kinds), scaled(50)))
    endure(checkpoint, socket_dir, faults, "--tp", "2", seed=2)


@pytest.mark.soak
def test_each_process_is_stopped_in_turn(checkpoint: Path, socket_dir: Path) -> None:
    faults = [Fault(kind, SIGSTOP) for kind in islice(cycle(KINDS), scaled(20))]
    endure(checkpoint, socket_dir, faults, "--stall-timeout", "2", seed=3)
