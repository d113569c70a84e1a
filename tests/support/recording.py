"""Transports for the clients' own HTTP clients that keep every body as its bytes came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import httpx2


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its reply. A stream that the client left has the body up to there."""

    path: str
    status: int
    streamed: bool
    body: bytearray = field(default_factory=bytearray)

    def events(self) -> list[str]:
        """The data of all whole events of a stream; pings are none."""
        *whole, _ = self.body.decode(errors="ignore").split("\n\n")
        lines = [line for event in whole for line in event.split("\n")]
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, exchange: Exchange) -> None:
        self._stream, self._exchange = stream, exchange

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._exchange.body += piece
            yield piece

    def close(self) -> None:
        self._stream.close()


class _AsyncBody(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, exchange: Exchange) -> None:
        self._stream, self._exchange = stream, exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._stream:
            self._exchange.body += piece
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


class Recorder:
    """Makes HTTP clients, and keeps what they get."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def begin(self, request: httpx2.Request, response: httpx2.Response) -> Exchange:
        kind = response.headers.get("content-type", "")
        streamed = kind.startswith("text/event-stream")
        exchange = Exchange(request.url.path, response.status_code, streamed)
        self.exchanges.append(exchange)
        return exchange

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=_Transport(self), timeout=60)

    def async_client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=_AsyncTransport(self), timeout=60)


class _Transport(httpx2.HTTPTransport):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        exchange = self._recorder.begin(request, response)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Body(response.stream, exchange)
        return response


class _AsyncTransport(httpx2.AsyncHTTPTransport):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__(limits=httpx2.Limits(max_connections=None))
        self._recorder = recorder

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        exchange = self._recorder.begin(request, response)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _AsyncBody(response.stream, exchange)
        return response
