"""No body holds up others: streams go on and /health answers while it is read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.heavy_bodies import BODIES, MAX_BYTES
from tests.support.server_process import ServerProcess, running
from tests.support.stream_watch import StreamWatch

pytestmark = pytest.mark.timed

MAX_ADDED_GAP_S = 0.05
MAX_PROBE_S = 0.05
# Other work on the machine adds to the time of any run, never takes away, so the best of some runs
# counts; and a limit grows with the time that a processor is shared.
MAX_RUNS = 4
SPIN_S = 0.02
QUICK = (
    *("one-id prompts", "4,000 text prompts", "200,000 token ids", "tokens to spell"),
    *("text of emoji", "messages", "messages up to the limit", "turns of 800 bytes"),
    *("texts after a call", "content parts up to the limit", "arguments of many numbers", "tools"),
    *("a schema of many properties", "logit_bias", "unknown fields up to the limit", "spaces"),
    *("a long name of structured output", "nested arrays", "numbers of 4,300 digits", "quotes"),
)


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running("--model", str(model_dir), tmp_dir=tmp_dir, check=False, step_s=0.004) as server:
        yield server


@pytest.fixture(scope="module")
def watch(server: ServerProcess) -> Iterator[StreamWatch]:
    with StreamWatch(server.url) as watch:
        yield watch


def slowdown() -> float:
    """How many times as long as its processor time some work of 20 ms takes here."""
    began, began_cpu = time.perf_counter(), time.thread_time()
    while time.thread_time() - began_cpu < SPIN_S:
        pass
    return (time.perf_counter() - began) / (time.thread_time() - began_cpu)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.soak) for name in BODIES]
)
def test_a_body_holds_up_nobody(watch: StreamWatch, name: str) -> None:
    path, make = BODIES[name]
    body = make()
    assert len(body) <= MAX_BYTES
    added, probe = [], []
    for _ in range(MAX_RUNS):
        without = watch.watch(0.3)
        share = max(slowdown() for _ in range(3))
        status, content, waits = watch.post(path, body)
        added.append((waits.longest_gap - without.longest_gap) / share)
        probe.append(waits.probe_p99 / share)
        print(
            f"{name}: {status}, slowdown {share:.1f}, gap {without.longest_gap * 1000:.0f} -> "
            f"{waits.longest_gap * 1000:.0f} ms, /health p99 {without.probe_p99 * 1000:.0f} -> "
            f"{waits.probe_p99 * 1000:.0f} ms"
        )
        assert status in (200, 400, 404), content[:500]
        json.loads(content)
        if added[-1] <= MAX_ADDED_GAP_S and probe[-1] <= MAX_PROBE_S:
            return
    pytest.fail(f"the longest gap grew by {min(added):.3f} s, /health took {min(probe):.3f} s")
