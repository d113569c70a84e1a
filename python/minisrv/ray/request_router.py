"""The cost router as a RequestRouter of Ray Serve."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from minisrv.ray.known import Known
from minisrv.ray.prompts import BLOCK_TOKENS
from minisrv.routing.prefix_index import PrefixIndex
from minisrv.routing.router import CostRouter, Prompt, ReplicaLoad

STALE_S = 5.0
MAX_BLOCKS = 100_000
MAX_PLANS = 10_000


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where a request is to go, and what its prompt costs there: tokens, of blocks not cached."""

    known: Known
    tokens: int
    blocks: Sequence[int]
    at: float


class CostRequestRouter(RequestRouter):  # type: ignore[misc]
    """Sends a request where its prompt is computed first, by what is queued and cached there.

    What is cached is known from what was sent, as much of it as fits into the cache of a replica,
    and nothing of what was sent before its scheduler was started again. Without a report of each
    replica in the last STALE_S, it falls back to Ray's power of two choices.

    A choice counts at once: a request is accepted some milliseconds later, and many may arrive in
    the meantime.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """See RequestRouter."""
        self._costs = CostRouter(PrefixIndex(MAX_BLOCKS))
        self._known: dict[ReplicaID, Known] = {}
        self._num_seen = 0
        self._plans: dict[str, _Plan] = {}  # by internal request id

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best replica, then two at random for the case that it does not accept."""
        pair = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [pair]
        pending_request.routing_context.should_backoff = True
        fresh = self._take_reports(candidate_replicas)
        if fresh is None:
            return [pair]
        now = time.time()
        loads = {self._known[one.replica_id].number: self._known[one.replica_id] for one in fresh}
        self._cancel_plan(pending_request)
        prompt = _prompt(pending_request)
        number = self._costs.choose(prompt, {i: one.load(now) for i, one in loads.items()}, now)
        self._plan(pending_request, loads[number], now)
        best = [one for one in fresh if self._known[one.replica_id].number == number]
        return [best, pair]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """See RequestRouter."""
        known = self._known.get(replica_id)
        plan = self._plans.get(pending_request.metadata.internal_request_id)
        if known is not None and (plan is None or plan.known is not known):
            self._cancel_plan(pending_request)
            self._plan(pending_request, known, time.time())
        self._plans.pop(pending_request.metadata.internal_request_id, None)
        if known is not None:
            known.open_requests += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """See RequestRouter."""
        if (known := self._known.get(replica_id)) is not None:
            known.open_requests = max(0, known.open_requests - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See RequestRouter; forgets those that are gone."""
        super().update_replicas(replicas)
        for replica_id in self._known.keys() - {one.replica_id for one in replicas}:
            self._costs.forget(self._known.pop(replica_id).number)

    def _plan(self, request: PendingRequest, known: Known, now: float) -> None:
        """Count a request for this replica."""
        prompt = _prompt(request)
        tokens = int(self._costs.wait_s(known.number, prompt, ReplicaLoad(0, 0, 1.0)))
        new_blocks = prompt.blocks[self._costs.index.num_matching(known.number, prompt.blocks) :]
        known.add(tokens, now)
        self._costs.record(known.number, prompt, now)
        self._plans[request.metadata.internal_request_id] = _Plan(known, tokens, new_blocks, now)
        if len(self._plans) > MAX_PLANS:  # of requests whose clients left before they were sent
            del self._plans[next(iter(self._plans))]

    def _cancel_plan(self, request: PendingRequest) -> None:
        if plan := self._plans.pop(request.metadata.internal_request_id, None):
            plan.known.take_back(plan.tokens, plan.at)
            self._costs.index.remove(plan.known.number, plan.blocks)

    def _take_reports(self, replicas: list[RunningReplica]) -> list[RunningReplica] | None:
        """The replicas that are ready; None if one has not reported recently."""
        ready = []
        for replica in replicas:
            stats = replica.routing_stats
            if not stats or time.time() - stats["at"] > STALE_S:
                return None
            if replica.replica_id not in self._known:
                self._known[replica.replica_id] = Known(self._num_seen)
                self._num_seen += 1
            known = self._known[replica.replica_id]
            if known.take_report(stats):
                self._costs.forget(known.number)
            if num_tokens := stats.get("max_total_num_tokens"):
                self._costs.index.capacity = min(MAX_BLOCKS, -(-num_tokens // BLOCK_TOKENS))
            if stats["ready"]:
                ready.append(replica)
        return ready or None


def _prompt(request: PendingRequest) -> Prompt:
    return Prompt(*request.args[0]["prompt"])
