"""A trace played against one or more servers in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minisrv.bench.traces import BLOCK_TOKENS, TraceRequest
from minisrv.routing.prefix_index import PrefixIndex
from minisrv.routing.router import CostRouter, PowerOfTwo, Prompt, RoundRobin, Router
from minisrv.simulation.prompts import PromptMaker
from minisrv.simulation.records import Bounds, Figures, Records, figures
from minisrv.simulation.replica import Replica, ServerShape
from minisrv.simulation.step_times import StepTimes

# By their names on the command line; each gets the blocks that a replica's cache holds.
ROUTERS: dict[str, Callable[[int], Router]] = {
    "round-robin": lambda capacity: RoundRobin(),
    "power-of-two": lambda capacity: PowerOfTwo(),
    "cost": lambda capacity: CostRouter(PrefixIndex(capacity)),
}


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


def simulate(
    traffic: Traffic,
    shape: ServerShape,
    times: StepTimes,
    bounds: Bounds,
    *,
    num_replicas: int = 1,
    router: str = "cost",
) -> Figures:
    """Play the traffic to its end, that is until every request has ended.

    All replicas are equal. router: a key of ROUTERS.
    """
    trace, prompts = traffic.trace, PromptMaker(traffic.block_tokens)
    records = Records(np.array([request.arrival_s for request in trace]), shape.request_s)
    replicas = [Replica(shape, times, records) for _ in range(num_replicas)]
    capacity = shape.num_pages * shape.page_size // traffic.block_tokens
    policy = ROUTERS[router](max(1, capacity))
    for uid, request in enumerate(trace):
        now = request.arrival_s
        for replica in replicas:
            replica.advance(now)
        prompt = Prompt(prompts.blocks(request), request.input_tokens, traffic.block_tokens)
        loads = {number: replica.load(now) for number, replica in enumerate(replicas)}
        chosen = policy.choose(prompt, loads, now)
        policy.record(chosen, prompt, now)
        prompt_ids = prompts.token_ids(prompt.blocks, prompt.num_tokens)
        replicas[chosen].send(uid, prompt_ids, request.output_tokens, now)
    for replica in replicas:
        replica.advance(math.inf)
    return figures(
        records,
        bounds,
        preemptions=sum(replica.scheduler.num_preemptions for replica in replicas),
        busy_s=sum(replica.engine.busy_s for replica in replicas) / num_replicas,
    )
