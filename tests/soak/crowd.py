"""Clients that share a server, many of them rude, and an exact account of what became of it all.

Every request that is sent ends as completed, refused or cancelled by its client; anything else is
a difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from tests.soak.hash_texts import HashRequest, RequestMaker, WrongReply
from tests.soak.raw_http import BrokenReply, Connection, Reply, json_request, request_bytes

REQUEST_TIMEOUT_S = 120
# The server closes a connection that has been idle for 5 s.
MAX_IDLE_S = 1
SMALL_BUFFER = 4096


class End(StrEnum):
    """What became of a request, as its client sees it."""

    COMPLETED = "completed"
    REFUSED = "refused"
    CANCELLED = "cancelled"


@dataclass
class Account:
    """statuses: of the replies that were read to their end; the others were cancelled."""

    num_sent: int = 0
    ends: Counter[End] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    @property
    def num_ended(self) -> int:
        return sum(self.ends.values())


class Client:
    """One client, with a connection that it keeps while nothing has gone wrong on it."""

    def __init__(self, address: tuple[str, int], maker: RequestMaker, account: Account) -> None:
        self._address, self._maker, self._account = address, maker, account
        self._connection: Connection | None = None
        self._used_at = 0.0

    async def run(self, count: int, rng: random.Random) -> None:
        """Send `count` requests, one after another."""
        kinds = list(KINDS)
        weights = list(KINDS.values())
        for _ in range(count):
            (kind,) = rng.choices(kinds, weights)
            await self._request(kind, rng)
        self._drop()

    async def _request(self, kind: Kind, rng: random.Random) -> None:
        account = self._account
        account.num_sent += 1
        account.kinds[kind.__name__] += 1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                end = await kind(self, rng)
            account.ends[end] += 1
            self._used_at = time.monotonic()
        except TimeoutError:
            self._differ(kind, f"no end within {REQUEST_TIMEOUT_S} s")
        except (BrokenReply, WrongReply, OSError, ValueError, KeyError) as error:
            self._differ(kind, f"{type(error).__name__}: {error}")

    def _differ(self, kind: Kind, sentence: str) -> None:
        self._account.differences.append(f"{kind.__name__}: {sentence}")
        self._drop()

    async def connect(self, rng: random.Random) -> Connection:
        """The kept connection, or a new one."""
        idle_s = time.monotonic() - self._used_at
        if self._connection is None or idle_s > MAX_IDLE_S or rng.random() < 0.1:
            self._drop()
            self._connection = await Connection.open(*self._address)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def finish(
        self,
        connection: Connection,
        request: HashRequest,
        between_chunks: Callable[[], Awaitable[None]] | None = None,
    ) -> End:
        """Read the reply to its end and check it."""
        reply = await connection.read_head()
        async for _ in connection.chunks(reply):
            if between_chunks is not None:
                await between_chunks()
        self._account.statuses[reply.status] += 1
        if reply.status == 503:
            return await self._overloaded(reply)
        request.check(reply)
        return End.COMPLETED

    async def _overloaded(self, reply: Reply) -> End:
        """Wait a second, which the server asks for at the least."""
        if not 1 <= int(reply.headers["retry-after"]) <= 60:
            raise WrongReply(f"Retry-After {reply.headers['retry-after']}")
        await asyncio.sleep(1)
        return End.REFUSED

    async def whole(self, rng: random.Random) -> End:
        """Wait for a reply that is not streamed."""
        connection = await self.connect(rng)
        request = self._maker.make(rng, stream=False)
        await connection.send(json_request(request.path, request.body))
        return await self.finish(connection, request)

    async def streamed(self, rng: random.Random) -> End:
        """Read a stream as it comes."""
        connection = await self.connect(rng)
        request = self._maker.make(rng, stream=True)
        await connection.send(json_request(request.path, request.body))
        return await self.finish(connection, request)

    async def read_slowly(self, rng: random.Random) -> End:
        """Read a stream through a small buffer with pauses, to its end."""
        self._drop()
        connection = await Connection.open(*self._address, receive_buffer=SMALL_BUFFER)
        try:
            request = self._maker.make(rng, stream=True, max_tokens=(8, 60))
            await connection.send(json_request(request.path, request.body))
            pause_s = rng.uniform(0.005, 0.05)
            return await self.finish(connection, request, lambda: asyncio.sleep(pause_s))
        finally:
            connection.close()

    async def stop_reading(self, rng: random.Random) -> End:
        """Never read a stream, and close in the end."""
        self._drop()
        connection = await Connection.open(*self._address, receive_buffer=SMALL_BUFFER)
        request = self._maker.make(rng, stream=True, max_tokens=(60, 120))
        await connection.send(json_request(request.path, request.body))
        await asyncio.sleep(rng.uniform(0.5, 3))
        connection.close()
        return End.CANCELLED

    async def leave_a_stream(self, rng: random.Random) -> End:
        """Close in the middle of a stream."""
        connection = await self.connect(rng)
        request = self._maker.make(rng, stream=True, max_tokens=(8, 60))
        await connection.send(json_request(request.path, request.body))
        reply = await connection.read_head()
        num_left = rng.randint(0, 4)
        async for _ in connection.chunks(reply):
            num_left -= 1
            if num_left < 0:
                break
        if reply.status == 503:
            self._account.statuses[503] += 1
            return await self._overloaded(reply)
        request.check_beginning(reply)
        self._drop()
        return End.CANCELLED

    async def leave_before_the_reply(self, rng: random.Random) -> End:
        """Close while the reply is computed, or while the request is still on its way."""
        connection = await self.connect(rng)
        request = self._maker.make(rng, stream=rng.random() < 0.5, max_tokens=(8, 60))
        await connection.send(json_request(request.path, request.body))
        await asyncio.sleep(rng.choice([0, 0.001, 0.02]))
        self._drop()
        return End.CANCELLED

    async def leave_half_a_request(self, rng: random.Random) -> End:
        """Send a part of a request, of its head or its body, and close."""
        connection = await self.connect(rng)
        request = self._maker.make(rng, stream=False)
        data = json_request(request.path, request.body)
        sent = rng.randint(1, len(data) - 1)
        await connection.send(data[:sent])
        await asyncio.sleep(rng.choice([0, 0.05, 1]))
        self._drop()
        return End.CANCELLED

    async def send_in_two_halves(self, rng: random.Random) -> End:
        """Pause in the middle of a request; it must be served all the same."""
        connection = await self.connect(rng)
        request = self._maker.make(rng, stream=rng.random() < 0.5)
        data = json_request(request.path, request.body)
        sent = rng.randint(1, len(data) - 1)
        await connection.send(data[:sent])
        await asyncio.sleep(rng.choice([0.001, 0.05, 0.5]))
        await connection.send(data[sent:])
        return await self.finish(connection, request)

    async def be_wrong(self, rng: random.Random) -> End:
        """Send what must be refused with a sentence."""
        connection = await self.connect(rng)
        data, status = rng.choice(WRONG)
        await connection.send(data)
        reply = await connection.read_reply()
        self._account.statuses[reply.status] += 1
        # What the tokenizer has to find needs a place, and there may be none.
        full = reply.status == 503 and int(reply.headers["retry-after"]) > 0
        if not (full or reply.status == status) or not reply.json()["error"]["message"]:
            raise WrongReply(f"{reply.status} instead of {status}: {reply.body[:300]!r}")
        if reply.headers.get("connection") == "close":
            self._drop()
        return End.REFUSED


Kind = Callable[[Client, random.Random], Awaitable[End]]
KINDS: dict[Kind, float] = {
    Client.whole: 0.32,
    Client.streamed: 0.30,
    Client.read_slowly: 0.03,
    Client.stop_reading: 0.01,
    Client.leave_a_stream: 0.10,
    Client.leave_before_the_reply: 0.08,
    Client.leave_half_a_request: 0.05,
    Client.send_in_two_halves: 0.04,
    Client.be_wrong: 0.07,
}
_COMPLETIONS = "/v1/completions"
WRONG: list[tuple[bytes, int]] = [
    (json_request(_COMPLETIONS, {"prompt": "a", "temperature": 3}), 400),
    (json_request(_COMPLETIONS, {"prompt": [1, 2, 999]}), 400),
    (json_request(_COMPLETIONS, {"prompt": "a" * 3000}), 400),
    (json_request(_COMPLETIONS, {"prompt": "a", "model": "another"}), 404),
    (json_request("/v1/chat/completions", {"messages": [{"role": "user"}]}), 400),
    (request_bytes(_COMPLETIONS, b'{"prompt": '), 400),
    (request_bytes(_COMPLETIONS, b"{}", headers={"Content-Type": "text/plain"}), 415),
    (json_request("/v1/completion", {}), 404),
    (request_bytes(_COMPLETIONS, method="GET"), 405),
]


async def run_crowd(
    address: tuple[str, int],
    maker: RequestMaker,
    *,
    num_requests: int,
    num_clients: int,
    seed: int,
    watch: Callable[[int], None],
) -> Account:
    """Let the clients send `num_requests` in all.

    watch: called twice a second with the number of requests that have ended.
    """
    account = Account()
    shares = [
        num_requests // num_clients + (i < num_requests % num_clients) for i in range(num_clients)
    ]

    async def watch_all() -> None:
        while True:
            watch(account.num_ended)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch_all())
    async with asyncio.TaskGroup() as clients:
        for number, share in enumerate(shares):
            rng = random.Random(f"{seed} {number}")
            clients.create_task(Client(address, maker, account).run(share, rng))
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return account


def report(account: Account, started: float) -> str:
    """The figures of a run."""
    seconds = time.monotonic() - started
    figures = {
        "sent": account.num_sent,
        **{end.value: account.ends[end] for end in End},
        "differences": len(account.differences),
        "seconds": round(seconds),
        "per_second": round(account.num_sent / seconds),
        "kinds": dict(account.kinds),
        "statuses": dict(account.statuses),
    }
    return json.dumps(figures)
