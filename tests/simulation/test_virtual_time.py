"""When tokens come out of a simulated server: its clock, its steps and what they are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmark.roofline import Rates, decode_step
from minisrv.bench.traces import TraceRequest
from minisrv.checkpoint.model_config import load_model_config
from minisrv.engine.gpus import find_gpu
from minisrv.simulation.fleet import Traffic, simulate
from minisrv.simulation.prompts import PromptMaker
from minisrv.simulation.records import Bounds, Records
from minisrv.simulation.replica import Replica, ServerShape
from minisrv.simulation.roofline import Roofline
from minisrv.simulation.step_times import StepWork
from tests.support.step_times import SteadyTimes

ROOT = Path(__file__).parent.parent.parent
SHAPE = ServerShape(num_pages=1000, page_size=16, max_seq_len=4096, max_prefill_tokens=64)
BOUNDS = Bounds(1.0, 0.1)


@pytest.mark.parametrize(
    ("depth", "host", "device", "first", "step"),
    [(0, 0.01, 0.1, 0.33, 0.11), (1, 0.01, 0.1, 0.31, 0.1), (1, 0.1, 0.01, 0.4, 0.1)],
    ids=["in turn", "device-bound", "host-bound"],
)
def test_a_request_takes_the_time_of_its_steps(
    depth: int, host: float, device: float, first: float, step: float
) -> None:
    """Three chunks, then decodes. With a step in flight the host works beside the device, and
    launches the next step before it looks at the tokens of this one.
    """
    records = Records(np.array([5.0]), request_s := 0.5)
    shape = replace(SHAPE, overlap_depth=depth, request_s=request_s)
    replica = Replica(shape, SteadyTimes(host, device), records)
    replica.send(0, np.arange(150, dtype=np.int32), 10, 5.0)
    replica.advance(5.4)
    assert replica.scheduler.num_open == 0, "the request is still on its way"
    replica.advance(float("inf"))
    assert records.first_at[0] - 5.0 == pytest.approx(first + 2 * request_s)
    gaps = records.inter_token_s()
    assert len(gaps) == 9
    assert gaps[:-1] == pytest.approx([step] * 8)  # nothing is launched before the last is seen
    assert records.ended.all()


def test_equal_blocks_are_cached_and_others_are_not() -> None:
    traffic = Traffic(
        [
            TraceRequest(0.0, 1000, 4, (7, 8)),
            TraceRequest(9.0, 1500, 4, (7, 8, 9)),
            TraceRequest(18.0, 1000, 4),
            TraceRequest(27.0, 1000, 4),
        ]
    )
    result = simulate(traffic, SHAPE, SteadyTimes(0.0, 0.01), BOUNDS)
    # Block 8 is only known as far as the first prompt goes: 62 whole pages.
    assert result.hit_rate == pytest.approx(62 * 16 / 4500)
    divided = simulate(traffic.divided(8), SHAPE, SteadyTimes(0.0, 0.01), BOUNDS)
    assert divided.hit_rate == pytest.approx(7 * 16 / (125 + 187 + 125 + 125))


def test_a_request_counts_as_good_if_it_keeps_both_bounds() -> None:
    traffic = Traffic([TraceRequest(0.0, 64 * n, 5) for n in (1, 2, 3)])
    result = simulate(traffic, SHAPE, SteadyTimes(0.0, 0.1), Bounds(0.25, 0.11))
    assert result.good_share == pytest.approx(1 / 3)
    assert result.itl_p50 == pytest.approx(0.1)
    assert simulate(traffic, SHAPE, SteadyTimes(0.0, 0.1), Bounds(0.25, 0.09)).goodput == 0


def test_a_prompt_that_does_not_fit_is_refused_and_counts_as_not_good() -> None:
    traffic = Traffic([TraceRequest(0.0, 5000, 5), TraceRequest(0.0, 10, 5)])
    result = simulate(traffic, SHAPE, SteadyTimes(0.0, 0.01), BOUNDS)
    assert (result.refused, result.good_share) == (1, 0.5)


def test_the_cost_router_finds_conversations_again() -> None:
    """39 conversations of eight turns, on four servers that hold a third of them each."""
    turns = [
        TraceRequest(
            turn * 8.0 + chat * 0.2,
            512 * (turn + 1),
            2,
            tuple(range(1000 * chat, 1000 * chat + turn + 1)),
        )
        for turn in range(8)
        for chat in range(39)
    ]
    shape = replace(SHAPE, num_pages=3600, max_seq_len=8192, max_prefill_tokens=512)
    results = {
        router: simulate(
            Traffic(turns), shape, SteadyTimes(0.0, 0.05), BOUNDS, num_replicas=4, router=router
        )
        for router in ("round-robin", "power-of-two", "cost")
    }
    best = 7 * 8 / 2 / (8 * 9 / 2)  # each turn finds all turns before it
    assert results["cost"].hit_rate > 0.95 * best
    for name in ("round-robin", "power-of-two"):
        assert results[name].hit_rate < 0.7 * best
        assert results[name].ttft_p50 > 1.5 * results["cost"].ttft_p50
    assert {result.requests for result in results.values()} == {39 * 8}


def test_a_replica_reports_what_it_has_to_compute_at_that_time() -> None:
    records = Records(np.array([0.0, 0.0, 1.0]))
    replica = Replica(SHAPE, SteadyTimes(0.0, 0.1), records)
    replica.send(0, np.arange(128, dtype=np.int32), 3, 0.0)
    assert replica.load(0.0).queued_tokens == 128
    assert replica.load(0.0).prefill_rate == pytest.approx(64 / 0.1)
    replica.advance(0.15)
    assert (replica.load(0.15).queued_tokens, replica.load(0.15).open_requests) == (128, 1)
    replica.advance(0.25)
    assert (replica.load(0.25).queued_tokens, replica.load(0.25).open_requests) == (0, 1)
    replica.send(1, np.arange(200, dtype=np.int32), 3, 0.25)
    assert replica.load(0.25).queued_tokens == 200 - 128
    replica.send(2, np.arange(99999, dtype=np.int32), 3, 0.25)
    replica.advance(float("inf"))
    assert (replica.load(9.0).queued_tokens, replica.load(9.0).open_requests) == (0, 0)


def test_tokens_that_the_engine_makes_up_are_not_a_prompt() -> None:
    maker = PromptMaker()
    request = TraceRequest(0.0, 700, 1, (2**60, 3))
    ids = maker.token_ids(maker.blocks(request), 700)
    assert (ids >= 0).all()
    assert len(set(ids.tolist())) == 700
    assert maker.blocks(request) == maker.blocks(request)


@pytest.mark.parametrize(
    "model", ["benchmark/models/Qwen3-8B", "tests/configs/Qwen3-30B-A3B"], ids=["dense", "sparse"]
)
def test_a_decode_step_takes_what_the_benchmark_calls_ideal(model: str) -> None:
    config = load_model_config(ROOT / model)
    roofline = Roofline.of(config, find_gpu("H200"))
    work = StepWork(
        decodes=16, decode_context=9000, chunks=0, prefill_tokens=0, prefill_pairs=0, samples=16
    )
    ideal = decode_step(config, 16, 9000, Rates(roofline.bandwidth, roofline.flops))
    assert roofline.device_s(work) == pytest.approx(sum(ideal), rel=1e-3)


def test_more_ranks_make_a_prompt_faster_but_not_by_their_number() -> None:
    config = load_model_config(ROOT / "benchmark/models/Qwen3-8B")
    work = StepWork(
        decodes=0, decode_context=0, chunks=1, prefill_tokens=4096, prefill_pairs=2**23, samples=1
    )
    one, four = (Roofline.of(config, find_gpu("H100"), tp=tp).device_s(work) for tp in (1, 4))
    assert one / 4 < four < one / 2
