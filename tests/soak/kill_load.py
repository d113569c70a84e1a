"""Clients that keep streams open over the deaths of processes, and what they see of each."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.soak.raw_http import BrokenReply, Connection, Reply, request_bytes
from tests.soak.real_requests import RealRequest, WrongReply
from tests.support.server_process import ServerProcess

NUM_CLIENTS = 16
HANG_S = 90
MODULES = {"rank 1": "engine.parallel"}  # where the module is not called as the process


@dataclass(frozen=True)
class Fault:
    """What is done to a process of a kind."""

    kind: str
    signal: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return self.kind if self.signal == signal.SIGKILL else f"{self.kind} stopped"

    @property
    def line(self) -> str:
        """What the server logs when the fault is over or noticed."""
        name = "tokenizer-0" if self.kind == "tokenizer" else self.kind
        return (
            "is started again" if self.signal == signal.SIGKILL else f"the {name} process goes on"
        )

    @property
    def cuts_connections(self) -> bool:
        return self.kind == "frontend" and self.signal == signal.SIGKILL


@dataclass(eq=False)
class Sent:
    """A request on its way. longest_gap_s: between two parts of the reply, or before the first."""

    request: RealRequest
    fault: Fault | None = None  # while it was open
    num_faults: int = 0
    longest_gap_s: float = 0.0


@dataclass
class Seen:
    """What became of the requests that were open at a kind of fault.

    ready_s: from each fault until /ready was 200 again. gaps_s: the longest of each stream.
    """

    num_open: int = 0
    num_cut: int = 0
    ready_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


class KillLoad:
    """NUM_CLIENTS clients that send one request after another while processes are killed.

    No request sees two faults: the next comes when all have ended that the last one met.
    """

    def __init__(
        self, server: ServerProcess, requests: Sequence[RealRequest], rng: random.Random
    ) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self._server, self._address = server, (host, int(port))
        self._requests, self._rng = requests, rng
        self._open: set[Sent] = set()
        self._ended = False
        self._num_deaths = 0
        self.num_replies = 0
        self.seen: dict[str, Seen] = {}
        self.differences: list[str] = []

    async def run(self, faults: Sequence[Fault]) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(NUM_CLIENTS):
                clients.create_task(self._client())
            for fault in faults:
                await asyncio.sleep(self._rng.uniform(0.1, 0.6))
                await self._hurt(fault)
                if self._server.popen.poll() is not None:
                    self.differences.append(f"the server ended: {self._server.lines[-3:]}")
                    break
            self._ended = True

    async def _hurt(self, fault: Fault) -> None:
        seen = self.seen.setdefault(str(fault), Seen())
        process = self._server.child(MODULES.get(fault.kind, fault.kind))
        num_lines = len(self._server.lines)
        hit = list(self._open)
        for sent in hit:
            sent.fault, sent.num_faults = fault, sent.num_faults + 1
        process.send_signal(fault.signal)
        self._num_deaths += fault.signal == signal.SIGKILL
        hurt_at = time.monotonic()
        seen.num_open += len(hit)
        while not any(fault.line in line for line in self._server.lines[num_lines:]):
            if time.monotonic() > hurt_at + HANG_S or self._server.popen.poll() is not None:
                self.differences.append(f"{fault}: nothing was done about it")
                return
            await asyncio.sleep(0.005)
        while not await self._is_ready():
            if time.monotonic() > hurt_at + HANG_S:
                self.differences.append(f"{fault}: not ready again")
                return
            await asyncio.sleep(0.01)
        seen.ready_s.append(time.monotonic() - hurt_at)
        while self._open.intersection(hit):
            await asyncio.sleep(0.01)

    async def _is_ready(self) -> bool:
        """Whether /ready is 200, in the epoch that follows the last death."""
        if (await self._get("/ready")).status != 200:
            return False
        lines = (await self._get("/metrics")).body.decode().splitlines()
        counts = [line.split()[-1] for line in lines if line.startswith("minisrv:restarts_total{")]
        return sum(map(float, counts)) == self._num_deaths

    async def _get(self, path: str) -> Reply:
        """The reply, or one without a status if the connection breaks."""
        try:
            async with asyncio.timeout(HANG_S):
                with await Connection.open(*self._address) as connection:
                    await connection.send(request_bytes(path, method="GET"))
                    return await connection.read_reply()
        except (OSError, BrokenReply, TimeoutError):
            return Reply(0, {})

    async def _client(self) -> None:
        while not self._ended:
            sent = Sent(self._rng.choice(self._requests))
            self._open.add(sent)
            try:
                await self._exchange(sent)
            except (BrokenReply, WrongReply, OSError, TimeoutError, ValueError) as error:
                what = f"{sent.request.name}: {type(error).__name__}: {error}"
                self.differences.append(f"{what[:600]} (after {sent.fault})")
                await asyncio.sleep(0.1)
            finally:
                self._open.remove(sent)
            if sent.num_faults > 1:
                self.differences.append(f"{sent.request.name}: two faults at one request")

    async def _exchange(self, sent: Sent) -> None:
        async with asyncio.timeout(HANG_S):
            with await Connection.open(*self._address) as connection:
                reply = Reply(0, {})
                try:
                    await connection.send(sent.request.data)
                    reply = await connection.read_head()
                    await self._read(connection, reply, sent)
                except (BrokenReply, ConnectionError):
                    if sent.fault is None or not sent.fault.cuts_connections:
                        raise
                    self.seen[str(sent.fault)].num_cut += 1
                    if "[DONE]" not in reply.events:
                        return
        sent.request.check(reply)
        self.num_replies += 1
        if sent.fault is not None and reply.is_stream:
            self.seen[str(sent.fault)].gaps_s.append(sent.longest_gap_s)

    async def _read(self, connection: Connection, reply: Reply, sent: Sent) -> None:
        last = time.monotonic()
        async for part in connection.chunks(reply):
            if part.startswith(b"data: "):
                now = time.monotonic()
                sent.longest_gap_s = max(sent.longest_gap_s, now - last)
                last = now


class StartWatch:
    """Seconds that each process of a server needs from its creation to its first beat."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.seconds: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        created: dict[str, float] = {}
        while len(self.seconds) < 4 and self._server.popen.poll() is None:
            for path in self._server.tmp_dir.glob("*/progress-*"):
                name, now = path.name.removeprefix("progress-").partition("-")[0], time.monotonic()
                created.setdefault(name, now)
                if name not in self.seconds and np.fromfile(path, np.float64, 1).any():
                    self.seconds[name] = now - created[name]
            time.sleep(0.005)

    def result(self) -> dict[str, float]:
        """By kind; a rank is started by the scheduler, with which it starts."""
        self._thread.join(60)
        return {**self.seconds, "rank 1": self.seconds["scheduler"]}


def percentile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent)) if values else math.nan


def table(seen: dict[str, Seen], start_s: dict[str, float]) -> str:
    """One line per kind of fault; times in seconds."""
    lines = [
        "| fault | times | requests open | cut | longest gap of a stream p50 | p99 | max "
        "| until ready p50 | max | less the start p50 | max | start |",
        "|---|" + "---:|" * 11,
    ]
    for name, one in sorted(seen.items()):
        start = start_s[name.removesuffix(" stopped")] if "stopped" not in name else 0.0
        gaps = [percentile(one.gaps_s, p) for p in (50, 99, 100)]
        ready = [percentile(one.ready_s, p) for p in (50, 100)]
        times = [*gaps, *ready, *(seconds - start for seconds in ready), start]
        counts = [len(one.ready_s), one.num_open, one.num_cut]
        cells = [*map(str, counts), *(f"{seconds:.2f}" for seconds in times)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
