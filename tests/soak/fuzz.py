"""Sends hostile inputs, each on a connection of its own, and judges what comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.soak.hostile import Hostile, fault_of
from tests.soak.raw_http import BrokenReply, Connection, ConnectionEnded, Reply

HANG_S = 60
LOOSE_WAIT_S = 0.3
MAX_SHOWN = 40
NUM_SLOWEST = 8


@dataclass
class FuzzReport:
    """statuses and slowest_s: by kind of input. faults: a sentence and the input for each.

    slowest: the inputs that took longest, with their seconds.
    """

    num_inputs: int = 0
    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    slowest_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    faults: list[str] = field(default_factory=list)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    def add_time(self, hostile: Hostile, seconds: float) -> None:
        self.slowest_s[hostile.kind] = max(self.slowest_s[hostile.kind], seconds)
        if len(self.slowest) < NUM_SLOWEST or seconds > self.slowest[-1][0]:
            self.slowest = sorted([(seconds, str(hostile)[:250]), *self.slowest], reverse=True)
            del self.slowest[NUM_SLOWEST:]

    def __str__(self) -> str:
        figures = {
            "inputs": self.num_inputs,
            "faults": len(self.faults),
            "statuses": {kind: dict(sorted(s.items())) for kind, s in self.statuses.items()},
            "slowest_s": {kind: round(s, 2) for kind, s in self.slowest_s.items()},
        }
        slowest = [f"{seconds:.1f} s: {text}" for seconds, text in self.slowest]
        return "\n".join([json.dumps(figures), *slowest, *self.faults[:MAX_SHOWN]])


async def run_fuzz(
    address: tuple[str, int], inputs: Iterator[Hostile], num_connections: int
) -> FuzzReport:
    """Send all inputs, `num_connections` at a time."""
    report = FuzzReport()

    async def work() -> None:
        for hostile in inputs:
            report.num_inputs += 1
            started = time.monotonic()
            fault = await _try(address, hostile, report)
            report.add_time(hostile, time.monotonic() - started)
            if fault is not None:
                report.faults.append(f"{fault}\n    {hostile}")

    async with asyncio.TaskGroup() as workers:
        for _ in range(num_connections):
            workers.create_task(work())
    return report


async def _try(address: tuple[str, int], hostile: Hostile, report: FuzzReport) -> str | None:
    """What is wrong with the server's answer to one input; None if nothing is."""
    connection = await Connection.open(*address)
    try:
        await _send(connection, hostile)
        return await _judge(connection, hostile, report.statuses[hostile.kind])
    except TimeoutError:
        return f"no answer within {HANG_S} s, after {connection.num_replies} replies"
    except (BrokenReply, ValueError) as error:
        return f"after {connection.num_replies} replies: {type(error).__name__}: {error}"
    finally:
        connection.close()


async def _send(connection: Connection, hostile: Hostile) -> None:
    try:
        for piece in hostile.pieces:
            await connection.send(piece)
            if len(hostile.pieces) > 1:
                await asyncio.sleep(0.001)
    except ConnectionError:
        pass  # refused before it was complete; the reply can still be read


async def _judge(connection: Connection, hostile: Hostile, statuses: Counter[int]) -> str | None:
    loose = hostile.num_replies is None
    while loose or connection.num_replies < (hostile.num_replies or 0):
        try:
            reply = await _next_reply(connection, hostile)
        except (ConnectionEnded, TimeoutError):
            if loose:
                return None
            raise
        statuses[reply.status] += 1
        if (fault := fault_of(reply, has_body=not hostile.for_head)) is not None:
            return fault
    return None


async def _next_reply(connection: Connection, hostile: Hostile) -> Reply:
    """A reply. Who sends what cannot be counted does not wait long for it to begin."""
    loose = hostile.num_replies is None
    async with asyncio.timeout(LOOSE_WAIT_S if loose else HANG_S):
        await connection.wait_for_reply()
    async with asyncio.timeout(HANG_S):
        return await connection.read_reply(has_body=not hostile.for_head)
