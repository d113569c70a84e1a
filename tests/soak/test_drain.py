"""Servers that are stopped under load finish what they have accepted."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop

from tests.soak.hash_texts import HashRequest, RequestMaker, WrongReply
from tests.soak.raw_http import (
    BrokenReply,
    Connection,
    ConnectionEnded,
    json_request,
    request_bytes,
)
from tests.soak.scale import SEED, scaled
from tests.support.server_process import ServerProcess, running

STEP_S = 0.004
# Requests that were sent this long before the stop are certainly accepted.
CERTAIN_S = 0.5
DRAIN_TIMEOUT_S = 30
# From the last reply to the end of all processes.
END_S = 5


@dataclass
class Drain:
    """accepted: requests that ended with their texts. refused: before a 200, with Retry-After.

    open_at_stop: requests that were sent and not answered to their end. unserved: got a connection
    but no reply, which must not happen. too_late: came when nobody listened any more.
    """

    accepted: int = 0
    open_at_stop: int = 0
    refused: int = 0
    unserved: int = 0
    too_late: int = 0
    ready_after_s: float | None = None
    differences: list[str] = field(default_factory=list)


class Load:
    """Clients that send a request each, and later ones that come when the server is stopping."""

    def __init__(self, server: ServerProcess, maker: RequestMaker, rng: random.Random) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self._server, self._address = server, (host, int(port))
        self._maker, self._rng = maker, rng
        self.stopped_at: float | None = None
        self._num_open = 0
        self.result = Drain()

    async def run(self, how: str, num_requests: int) -> Drain:
        """Stop the server the given way at a random moment under load, and wait for all replies.

        A connection without a request and one with half a request must not hold up the end.
        """
        idle, half = [await Connection.open(*self._address) for _ in "12"]
        await idle.send(request_bytes("/health", method="GET"))
        await half.send(request_bytes("/v1/completions", b"{}")[:-1])
        async with asyncio.TaskGroup() as clients:
            spread_s = self._rng.uniform(0.2, 1.0)
            for _ in range(num_requests):
                clients.create_task(self._client(self._rng.uniform(0, spread_s)))
            await asyncio.sleep(self._rng.uniform(0.2, 1.5))
            await self._stop(how)
            clients.create_task(self._watch_ready())
            for _ in range(8):
                clients.create_task(self._client(self._rng.uniform(0.1, 0.6)))
        await self._wait_for_the_end()
        for connection in (idle, half):
            connection.close()
        return self.result

    async def _wait_for_the_end(self) -> None:
        answered_at = time.monotonic()
        while self._server.popen.poll() is None:
            if time.monotonic() > answered_at + END_S:
                self.result.differences.append(f"still there {END_S} s after the last reply")
                return
            await asyncio.sleep(0.02)

    async def _stop(self, how: str) -> None:
        self.stopped_at = time.monotonic()
        self.result.open_at_stop = self._num_open
        if how == "POST /drain":
            with await Connection.open(*self._address) as connection:
                await connection.send(request_bytes("/drain", b"{}"))
                reply = await connection.read_reply()
            if reply.status != 202:
                self.result.differences.append(f"/drain: {reply.status} {reply.body[:200]!r}")
        else:
            self._server.popen.send_signal(signal.Signals[how])

    async def _client(self, delay_s: float) -> None:
        request = self._maker.make(
            self._rng, stream=self._rng.random() < 0.6, max_tokens=(20, 200), ignore_eos=True
        )
        await asyncio.sleep(delay_s)
        sent_at = time.monotonic()
        try:
            connection = await Connection.open(*self._address)
        except ConnectionRefusedError:
            self._refuse_connection()
            return
        self._num_open += 1
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._exchange(connection, request, sent_at)
        except ConnectionEnded as error:
            self.result.unserved += 1
            self._differ(f"no reply: {error}", sent_at)
        except (BrokenReply, WrongReply, TimeoutError, OSError, ValueError, KeyError) as error:
            self._differ(f"{type(error).__name__}: {error}", sent_at)
        finally:
            self._num_open -= 1
            connection.close()

    def _refuse_connection(self) -> None:
        """Only a server that has ended all its replies may have stopped listening."""
        self.result.too_late += 1
        if self._num_open or self.stopped_at is None:
            self.result.differences.append(f"not connected, with {self._num_open} replies open")

    def _differ(self, sentence: str, sent_at: float) -> None:
        after = "" if self.stopped_at is None else f", sent {sent_at - self.stopped_at:+.3f} s"
        self.result.differences.append(sentence + after)

    def _is_certain(self, sent_at: float) -> bool:
        """Whether a request was sent so early that the server has accepted it."""
        return self.stopped_at is None or sent_at < self.stopped_at - CERTAIN_S

    async def _exchange(self, connection: Connection, request: HashRequest, sent_at: float) -> None:
        await connection.send(json_request(request.path, request.body))
        reply = await connection.read_reply()
        if reply.status != 503:
            request.check(reply)
            self.result.accepted += 1
            return
        if self._is_certain(sent_at) or reply.json()["error"]["code"] != "server_draining":
            raise WrongReply(f"refused: {reply.body!r}")
        if not 1 <= int(reply.headers["retry-after"]) <= 600:
            raise WrongReply(f"Retry-After {reply.headers['retry-after']}")
        self.result.refused += 1

    async def _watch_ready(self) -> None:
        """/ready must be 503 at once, as long as somebody listens."""
        assert self.stopped_at is not None
        while time.monotonic() < self.stopped_at + 5:
            try:
                with await Connection.open(*self._address) as connection:
                    await connection.send(request_bytes("/ready", method="GET"))
                    status = (await connection.read_reply()).status
            except (OSError, BrokenReply):
                return
            seconds = time.monotonic() - self.stopped_at
            if status == 503:
                self.result.ready_after_s = seconds
                return
            if seconds > 2:
                self.result.differences.append(f"/ready is {status} {seconds:.2f} s after the stop")
                return
            await asyncio.sleep(0.02)


def drain(model_dir: Path, tmp_dir: Path, number: int, num_requests: int) -> Drain:
    """One server, stopped under load; raises AssertionError at whatever is lost."""
    rng = random.Random(f"{SEED} {number}")
    how = ("SIGTERM", "SIGTERM", "SIGINT", "POST /drain")[number % 4]
    with running("--model", str(model_dir), tmp_dir=tmp_dir, step_s=STEP_S) as server:
        result = uvloop.run(Load(server, RequestMaker(model_dir), rng).run(how, num_requests))
        assert result.differences == [], (how, result.differences[:5])
        assert result.unserved == 0
        assert server.wait() == 0, server.output
        assert "Traceback" not in server.output, server.output
        server.assert_nothing_is_left()
    print(f"{number} {how}: {num_requests} requests, {result}")
    return result


def second_signal(model_dir: Path, tmp_dir: Path, number: int) -> float:
    """Seconds from a second signal under load to the end of the server."""
    rng = random.Random(f"{SEED} second {number}")
    with running("--model", str(model_dir), tmp_dir=tmp_dir, step_s=0.05) as server:
        return uvloop.run(_signal_twice(server, RequestMaker(model_dir), rng))


async def _signal_twice(server: ServerProcess, maker: RequestMaker, rng: random.Random) -> float:
    load = Load(server, maker, rng)
    running_load = asyncio.create_task(load.run("SIGTERM", 32))
    while load.stopped_at is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(rng.uniform(0, 0.5))
    started = time.monotonic()
    server.popen.send_signal(signal.SIGTERM)
    while server.popen.poll() is None:
        assert time.monotonic() < started + 10, "the second signal does not end the server"
        await asyncio.sleep(0.005)
    seconds = time.monotonic() - started
    await running_load
    return seconds


@pytest.mark.timed
def test_a_stop_under_load_loses_nothing(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A drain by HTTP; one by a signal under load is in tests/processes/test_drain.py."""
    result = drain(model_dir, tmp_path_factory.mktemp("s") / "t", 3, 24)
    assert result.accepted > 0


@pytest.mark.soak
def test_many_stops_under_load_lose_nothing(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(SEED)
    totals: Counter[str] = Counter()
    for number in range(scaled(50)):
        tmp_dir = tmp_path_factory.mktemp("s") / "t"
        result = drain(model_dir, tmp_dir, number, rng.randint(16, 64))
        totals["accepted"] += result.accepted
        totals["open at the stop"] += result.open_at_stop
        totals["refused"] += result.refused
        totals["unserved"] += result.unserved
        totals["too late"] += result.too_late
    print(dict(totals))
    assert min(totals["accepted"], totals["refused"]) > 0
    assert totals["unserved"] == 0


@pytest.mark.soak
def test_many_second_signals_under_load_end_the_server(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seconds = [
        second_signal(model_dir, tmp_path_factory.mktemp("s") / "t", number)
        for number in range(scaled(10))
    ]
    print(f"longest: {max(seconds):.2f} s")
    assert max(seconds) < 2
