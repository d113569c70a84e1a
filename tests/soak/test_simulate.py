"""The simulation of a measured server, beside that server: the same trace in real time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minisrv.bench.client import Client, Outcome, Sampling
from minisrv.bench.traces import TraceRequest, read_trace
from minisrv.simulation.calibrate import calibrate
from minisrv.simulation.fleet import Traffic, simulate
from minisrv.simulation.prompts import PromptMaker
from minisrv.simulation.records import Bounds
from tests.support.server_process import running

DURATION_S = float(os.environ.get("MINISRV_SOAK_SIMULATE_S", "600"))
TRACE = os.environ.get("MINISRV_SOAK_TRACE")  # such as Mooncake's; otherwise one like it is made
SPEED = 0.5  # nearer to its limit, small errors make queues of other lengths
DIVISOR, SHORTEST, LONGEST = 32, 8, 3400
# Divided like the prompts, outputs would have ten tokens, most of which wait for other prompts.
OUTPUT_DIVISOR = 8
FIRST_ID, LAST_ID = 100, 500  # of the demo model's plain tokens
SERVER = ("--model", "demo", "--dtype", "float32", "--num-threads", "1", "--num-pages", "3000")


def make_trace(seconds: float) -> list[TraceRequest]:
    """Conversations that begin alike: 2.5 requests per second, each turn with the turns before."""
    rng, trace, now, last_block = random.Random(0), list[TraceRequest](), 0.0, 0
    chats: list[tuple[int, ...]] = []
    while now < seconds:
        now += rng.expovariate(2.5)
        if chats and rng.random() < 0.5:
            chat = chats.pop(rng.randrange(len(chats)))
        else:
            chat = (0, 1, 2, 3)
        length = min(240, len(chat) + 1 + int(rng.lognormvariate(2.0, 0.8)))
        chat += tuple(range(last_block + 10, last_block + 10 + length - len(chat)))
        last_block = chat[-1]
        chats = [*chats[-60:], chat]
        output = 1 + min(2000, int(rng.lognormvariate(5.5, 0.8)))
        trace.append(TraceRequest(now, 512 * length - rng.randrange(500), output, chat))
    return trace


def make_traffic() -> Traffic:
    """The trace at the scale of the demo model, without what is too long for it."""
    trace = make_trace(DURATION_S * SPEED) if TRACE is None else read_trace(Path(TRACE))
    trace = [r for r in trace if r.arrival_s < DURATION_S * SPEED]
    divided = Traffic(trace).divided(DIVISOR)
    fitting = [
        replace(short, output_tokens=max(1, full.output_tokens // OUTPUT_DIVISOR))
        for short, full in zip(divided.trace, trace, strict=True)
        if SHORTEST <= short.input_tokens <= LONGEST
    ]
    return Traffic(fitting, divided.block_tokens).faster(SPEED)


async def play(url: str, traffic: Traffic) -> list[Outcome]:
    """Send each request when it is due; the outcomes in order."""
    client = Client(url, "demo", sampling=Sampling(temperature=1.0))
    maker = PromptMaker(traffic.block_tokens)
    began = time.perf_counter() + 1.0

    async def send(request: TraceRequest) -> Outcome:
        blocks = [
            np.random.default_rng(block).integers(FIRST_ID, LAST_ID, traffic.block_tokens)
            for block in maker.blocks(request)
        ]
        prompt = json.dumps(np.concatenate(blocks)[: request.input_tokens].tolist())
        due = began + request.arrival_s
        await asyncio.sleep(due - time.perf_counter())
        outcome, _ = await client.generate(prompt, request.output_tokens, due)
        return outcome

    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for request in traffic.trace:
                # The prompts are made shortly before they are due.
                await asyncio.sleep(began + request.arrival_s - 0.5 - time.perf_counter())
                tasks.append(group.create_task(send(request)))
    finally:
        client.close()
    return [task.result() for task in tasks]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_measured_server_does_as_simulated(tmp_path: Path) -> None:
    """Median TTFT and ITL within 15 %, and the hit rate within 2 points."""
    traffic = make_traffic()
    with running(*SERVER, tmp_dir=tmp_path / "t", hash_engine=False) as server:
        calibration = calibrate(server.url, "", print)
        outcomes = asyncio.run(play(server.url, traffic))
    empty = [o for o in outcomes if o.failure and o.failure.kind == "reply without output"]
    assert [o.failure for o in outcomes if o.failure and o not in empty] == []
    assert len(empty) < len(outcomes) / 50, "the model's tokens have no text"
    outcomes = [o for o in outcomes if not o.failure]
    simulated = simulate(traffic, calibration.shape, calibration.times, Bounds(2.0, 0.1))
    ttft = statistics.median(o.chunk_s[0] - o.planned_s for o in outcomes)
    itl = statistics.median(b - a for o in outcomes for a, b in pairwise(o.chunk_s))
    hits = sum(o.cached_tokens or 0 for o in outcomes)
    hit_rate = hits / sum(o.prompt_tokens or 0 for o in outcomes)
    errors = sorted(map(abs, calibration.errors()))
    print(f"{calibration.times}, off by {errors[len(errors) // 2]:.1%} at the median")
    print(f"{len(outcomes)} requests, engine busy {simulated.busy:.0%} in the simulation")
    print(f"real:      TTFT {ttft:.4f} s, ITL {itl * 1e3:.2f} ms, hits {hit_rate:.2%}")
    print(
        f"simulated: TTFT {simulated.ttft_p50:.4f} s, ITL {simulated.itl_p50 * 1e3:.2f} ms, "
        f"hits {simulated.hit_rate:.2%}"
    )
    assert simulated.hit_rate == pytest.approx(hit_rate, abs=0.02)
    assert simulated.ttft_p50 == pytest.approx(ttft, rel=0.15)
    assert simulated.itl_p50 == pytest.approx(itl, rel=0.15)
