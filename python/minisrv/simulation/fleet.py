"""A trace played against servers in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from minisrv.bench.traces import BLOCK_TOKENS, TraceRequest
from minisrv.simulation.prompts import PromptMaker
from minisrv.simulation.records import Bounds, Figures, Records, figures
from minisrv.simulation.replica import Replica, ServerShape
from minisrv.simulation.step_times import StepTimes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests, and how many tokens their blocks have."""

    trace: Sequence[TraceRequest]
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        assert self.trace, "a trace has at least one request"

    def faster(self, speed: float) -> Traffic:
        """The same requests, arriving `speed` times as fast."""
        trace = [replace(r, arrival_s=r.arrival_s / speed) for r in self.trace]
        return Traffic(trace, self.block_tokens)

    def divided(self, divisor: int) -> Traffic:
        """The same requests with prompts, outputs and blocks shorter by `divisor`."""
        block_tokens = self.block_tokens // divisor
        trace = []
        for request in self.trace:
            length = max(1, request.input_tokens // divisor)
            blocks = request.block_ids[: math.ceil(length / block_tokens)]
            output = max(1, request.output_tokens // divisor)
            trace.append(TraceRequest(request.arrival_s, length, output, blocks, request.session))
        return Traffic(trace, block_tokens)


def simulate(traffic: Traffic, shape: ServerShape, times: StepTimes, bounds: Bounds) -> Figures:
    """Play the traffic to its end, that is until every request has ended."""
    trace, prompts = traffic.trace, PromptMaker(traffic.block_tokens)
    records = Records(np.array([request.arrival_s for request in trace]), shape.request_s)
    replica = Replica(shape, times, records)
    for uid, request in enumerate(trace):
        replica.advance(request.arrival_s)
        prompt_ids = prompts.token_ids(prompts.blocks(request), request.input_tokens)
        replica.send(uid, prompt_ids, request.output_tokens, request.arrival_s)
    replica.advance(math.inf)
    return figures(
        records,
        bounds,
        preemptions=replica.scheduler.num_preemptions,
        busy_s=replica.engine.busy_s,
    )
