"""Sends a workload to a server: a given number of conversations at once, or at planned times."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minisrv.bench.client import INTERRUPTED, Client, Outcome
from minisrv.bench.prompts import Prompts
from minisrv.bench.workloads import Conversation


@dataclass(slots=True)
class Run:
    """What one run measured.

    outcomes: one for each request that was sent, in the order of their ends. wall_s: from the first
    request to the last end. cpu_s: processor time of this process. unsent: requests that were
    planned and not sent, after an interruption or because a turn before them failed.
    """

    outcomes: list[Outcome]
    wall_s: float
    cpu_s: float
    unsent: int
    interrupted: bool = False


async def run(
    client: Client,
    prompts: Prompts,
    conversations: Sequence[Conversation],
    concurrency: int | None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> Run:
    """Have all conversations; `report` gets each outcome as soon as it is known.

    concurrency: conversations at once; None: each begins at its arrival_s. If the task is
    cancelled, open requests end as interrupted and what was measured is returned.
    """
    outcomes: list[Outcome] = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        report(outcome)

    gc.collect()
    gc.freeze()  # so that the collector does not walk over all conversations during the run
    started_s, cpu_s = time.perf_counter(), time.process_time()
    talk = _Talk(client, prompts, started_s, add)
    sending = _at_once if concurrency is not None else _as_planned
    interrupted = False
    try:
        await sending(talk, conversations, concurrency or 0)
    except asyncio.CancelledError:
        interrupted = True
    cpu_s = time.process_time() - cpu_s
    wall_s = max((outcome.end_s for outcome in outcomes), default=started_s) - started_s
    planned = sum(len(conversation.turns) for conversation in conversations)
    return Run(outcomes, wall_s, cpu_s, planned - len(outcomes), interrupted)


@dataclass(frozen=True, slots=True)
class _Talk:
    client: Client
    prompts: Prompts
    started_s: float
    add: Callable[[Outcome], None]

    async def __call__(self, conversation: Conversation, planned_s: float | None = None) -> bool:
        """Have one conversation, until a request fails. Returns False if it is interrupted."""
        parts: list[str] = []
        as_recorded = planned_s is not None
        last = len(conversation.turns) - 1
        for number, turn in enumerate(conversation.turns):
            if number:
                planned_s = time.perf_counter() + turn.think_s
                if as_recorded and turn.arrival_s is not None:
                    planned_s = max(planned_s, self.started_s + turn.arrival_s)
                await asyncio.sleep(planned_s - time.perf_counter())
            parts.append(self.prompts.part(turn.segments, first=not number))
            prompt = self.prompts.prompt(parts)
            outcome, reply = await self.client.generate(
                prompt, turn.output_tokens, planned_s, keep_output=number < last
            )
            self.add(outcome)
            if outcome.failure is not None:
                return outcome.failure is not INTERRUPTED
            parts.append(self.prompts.answer(reply))
        return True


async def _at_once(talk: _Talk, conversations: Sequence[Conversation], concurrency: int) -> None:
    waiting = iter(conversations)

    async def worker() -> None:
        for conversation in waiting:
            if not await talk(conversation):
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def _as_planned(talk: _Talk, conversations: Sequence[Conversation], _: int) -> None:
    async def begin(conversation: Conversation) -> None:
        planned_s = talk.started_s + conversation.arrival_s
        await asyncio.sleep(planned_s - time.perf_counter())
        await talk(conversation, planned_s)

    async with asyncio.TaskGroup() as group:
        for conversation in conversations:
            group.create_task(begin(conversation))
