"""The simulated scheduler decides as that of a real engine: the same batches, step by step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from minisrv.bench.traces import TraceRequest
from minisrv.checkpoint.hub import DEMO_DIR
from minisrv.config import ServerConfig
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.step_plan import StepPlan
from minisrv.simulation.prompts import PromptMaker
from minisrv.simulation.records import Records
from minisrv.simulation.replica import Replica, ServerShape
from minisrv.start_progress import no_progress
from tests.support.builders import generate_msg
from tests.support.step_times import SteadyTimes

PAGE, PAGES, BUDGET, ROWS, VOCAB = 4, 40, 24, 6, 512
Step = tuple[int, list[tuple[int, int]]]  # decodes; start and length of each sequence


def make_trace(seed: int) -> list[TraceRequest]:
    """Prompts that share beginnings, and too much output for the pages."""
    rng, trace = random.Random(seed), []
    for number in range(14):
        shared = rng.choice([(), (1,), (1, 2), (1, 2, 3)])
        blocks = (*shared, *(1000 + 10 * number + i for i in range(rng.randint(1, 3))))
        length = len(blocks) * 8 - rng.randint(0, 7)
        trace.append(TraceRequest(0.0, length, rng.randint(1, 40), blocks))
    return trace


def batch_step(batch: ForwardBatch) -> Step:
    pairs = zip(batch.start_positions.tolist(), batch.query_lens.tolist(), strict=True)
    return batch.num_decodes, list(pairs)


def plan_step(plan: StepPlan) -> Step:
    decodes = [(request.num_computed - 1, 1) for request in plan.decodes]
    return len(decodes), decodes + [(chunk.start, chunk.length) for chunk in plan.prefills]


def real_steps(prompts: list[Any], trace: list[TraceRequest], depth: int) -> tuple[Any, ...]:
    config = ServerConfig(
        **{"device": "cpu", "dtype": "float32", "num_threads": 1, "num_pages": PAGES},
        **{"page_size": PAGE, "max_running_requests": ROWS, "max_prefill_tokens": BUDGET},
        overlap_depth=depth,
    )
    loop = build_loop(config, DEMO_DIR, LocalChannel(), no_progress)
    steps, launch = [], loop.engine.launch

    def record(batch: ForwardBatch) -> Any:
        steps.append(batch_step(batch))
        return launch(batch)

    loop.engine.launch = record
    for uid, (ids, request) in enumerate(zip(prompts, trace, strict=True)):
        sampling = {"max_tokens": request.output_tokens, "ignore_eos": True}
        loop.channel.inbox.append(generate_msg(uid, ids, temperature=1.0, seed=uid, **sampling))
    while loop.busy or loop.channel.inbox:
        loop.turn()
    cached = {s.uid: s.cached_tokens for message in loop.channel.outbox for s in message.starts}
    loop.engine.close()
    return steps, cached, loop.scheduler.num_preemptions


def simulated_steps(prompts: list[Any], trace: list[TraceRequest], depth: int) -> tuple[Any, ...]:
    shape = ServerShape(
        num_pages=PAGES,
        page_size=PAGE,
        max_seq_len=1024,
        max_prefill_tokens=BUDGET,
        max_running_requests=ROWS,
        overlap_depth=depth,
    )
    records = Records(np.zeros(len(trace)))
    replica = Replica(shape, SteadyTimes(0.0, 0.01), records)
    steps, launch = [], replica.loop._launch

    def record(plan: StepPlan) -> Any:
        steps.append(plan_step(plan))
        return launch(plan)

    replica.loop._launch = record  # type: ignore[method-assign]
    for uid, (ids, request) in enumerate(zip(prompts, trace, strict=True)):
        replica.send(uid, ids, request.output_tokens, 0.0)
    replica.advance(float("inf"))
    cached = dict(enumerate(records.cached_tokens.tolist()))
    return steps, cached, replica.scheduler.num_preemptions


@pytest.mark.parametrize("depth", [0, 1])
def test_the_batches_are_those_of_a_real_engine(depth: int) -> None:
    trace, maker = make_trace(depth), PromptMaker(block_tokens=8)
    prompts = [maker.token_ids(maker.blocks(r), r.input_tokens) % VOCAB for r in trace]
    real = real_steps(prompts, trace, depth)
    simulated = simulated_steps(prompts, trace, depth)
    assert real == simulated
    steps, cached, preemptions = real
    assert any(0 < decodes < len(sequences) for decodes, sequences in steps), "no mixed step"
    assert sum(cached.values()) > 0
    assert preemptions > 0
