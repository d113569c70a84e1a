"""The client keeps connections, and reports every failure of a request by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from minisrv.bench.client import INTERRUPTED, BenchError, Client, Outcome, Sampling
from minisrv.errors import ConfigError

EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
REPLY = EVENT + b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[str]:
    """The URL of a server that has `answer` write to each request."""
    handlers = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(x for x in head.split(b"\r\n") if x.startswith(b"Content-Length"))
                await answer(head + await reader.readexactly(int(length[15:])), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await asyncio.gather(*filter(None, handlers))


def generate(answer: Answer, count: int = 1, timeout_s: float = 30) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with answering(answer) as url:
            client = Client(url, "m", timeout_s=timeout_s)
            outcomes = [(await client.generate("[1, 2]", 5))[0] for _ in range(count)]
            client.close()
            return outcomes

    return asyncio.run(run())


def test_the_request_is_what_the_api_asks_for() -> None:
    requests = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        requests.append(request)
        writer.write(whole(REPLY))

    async def run() -> None:
        async with answering(answer) as url:
            sampling = Sampling(0.5, False, {"top_p": 0.9})
            client = Client(f"{url}/v1/", "m", api_key="k", endpoint="chat", sampling=sampling)
            outcome, _ = await client.generate('[{"role": "user", "content": "a"}]', 5)
            assert outcome.failure is None
            client.close()

    asyncio.run(run())
    head, body = requests[0].split(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer k\r\n" in head
    assert json.loads(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_connection_is_kept_for_the_next_request() -> None:
    peers = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        peers.append(writer.get_extra_info("peername"))
        writer.write(whole(REPLY))

    outcomes = generate(answer, 3)
    assert [outcome.failure for outcome in outcomes] == [None] * 3
    assert len(set(peers)) == 1


def test_a_request_on_a_connection_that_the_server_closed_is_sent_again() -> None:
    requests = []

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        requests.append(request)
        if len(requests) == 2:
            writer.close()
        else:
            writer.write(whole(REPLY))

    assert [outcome.failure for outcome in generate(answer, 2)] == [None, None]
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        (b"", "connection closed before the reply"),
        (b"nonsense\r\n\r\n", "reply is not HTTP"),
        (HEAD + b"Content-Length: 999\r\n\r\n" + EVENT, "reply broken off"),
        (HEAD + b"Connection: close\r\n\r\n" + REPLY, None),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nslow", "status 429"),
    ],
)
def test_what_a_server_writes_before_it_closes(written: bytes, kind: str | None) -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(written)
        writer.close()

    (outcome,) = generate(answer)
    assert (outcome.failure and outcome.failure.kind) == kind


def test_a_reply_that_does_not_end_in_time_fails() -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: 999\r\n\r\n" + EVENT)

    (outcome,) = generate(answer, timeout_s=1.0)
    assert outcome.failure is not None
    assert outcome.failure.kind == "timeout"
    assert len(outcome.chunk_s) == 1


def test_a_request_that_is_cancelled_is_reported_as_interrupted() -> None:
    arrived = asyncio.Event()

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        arrived.set()

    async def run() -> Outcome:
        async with answering(answer) as url:
            sending = asyncio.ensure_future(Client(url, "m").generate("[1]", 5))
            await arrived.wait()
            sending.cancel()
            return (await sending)[0]

    assert asyncio.run(run()).failure is INTERRUPTED


def test_a_server_that_cannot_be_reached() -> None:
    client = Client("http://127.0.0.1:1", "m")
    outcome, _ = asyncio.run(client.generate("[1]", 5))
    assert outcome.failure is not None
    assert outcome.failure.kind == "connection refused"
    with pytest.raises(BenchError, match="no server answers at http"):
        asyncio.run(client.first_model())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", ""])
def test_a_url_without_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a server"):
        Client(url)
