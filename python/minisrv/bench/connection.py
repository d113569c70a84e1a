"""HTTP/1.1 connections that cost little for each piece of a streamed reply.

An asyncio protocol with the parser of httptools: a general HTTP client takes several times as much
processor time for each token, and would then measure itself.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from minisrv.bench.reply import Failure
from minisrv.option_values import read_server_url


class Receiver(Protocol):
    """Takes a response as it arrives. `now` is in the seconds of time.perf_counter."""

    def begin(self, status: int) -> None: ...

    def feed(self, data: bytes, now: float) -> None: ...


class RequestError(Exception):
    """A request that failed before or beside its reply."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message or failure.kind)
        self.failure = failure


class Connection(asyncio.Protocol):
    """One connection, which carries one request at a time.

    received: bytes of the present response.
    """

    def __init__(self) -> None:
        self._closed = False
        self.received = 0
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._ended: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether another request may be sent."""
        return not (self._closed or self._transport is None or self._transport.is_closing())

    async def exchange(self, request: bytes, receiver: Receiver) -> None:
        """Send a request; returns when its response is complete or the connection has closed."""
        assert self._transport is not None
        self.received = 0
        self._receiver = receiver
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._ended
        except BaseException:
            self.close()
            raise
        finally:
            self._receiver = None

    def close(self) -> None:
        """Close the connection at once."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls this."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """asyncio calls this."""
        self._now = time.perf_counter()
        self.received += len(data)
        if self._receiver is None:  # nothing was asked for
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.close()
            self._end(RequestError(Failure("reply is not HTTP", str(error))))

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls this."""
        self._closed = True
        self._end(RequestError(_connection_failure(exc)) if isinstance(exc, OSError) else None)

    def on_headers_complete(self) -> None:
        """The parser calls this."""
        if self._receiver is not None:
            self._receiver.begin(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        """The parser calls this."""
        if self._receiver is not None:
            self._receiver.feed(body, self._now)

    def on_message_complete(self) -> None:
        """The parser calls this."""
        if not self._parser.should_keep_alive():
            self.close()
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


class ConnectionPool:
    """Connections to one server, kept open between requests. Raises ConfigError for a wrong URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(read_server_url(url))
        self.host = parts.netloc
        self._address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._idle: list[Connection] = []

    async def send(self, request: bytes, receiver: Receiver) -> None:
        """Send a request over an idle connection or a new one.

        Once more over a new one if the server had closed the idle one. Raises RequestError.
        """
        if (idle := self._take_idle()) is not None:
            try:
                await idle.exchange(request, receiver)
            except RequestError:
                if idle.received:
                    raise
            if idle.received:
                self._keep(idle)
                return
        connection = await self._connect()
        await connection.exchange(request, receiver)
        self._keep(connection)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    def _keep(self, connection: Connection) -> None:
        if connection.is_open:
            self._idle.append(connection)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, *self._address, ssl=self._ssl)
        except OSError as error:
            raise RequestError(_connection_failure(error)) from None
        return connection


def _connection_failure(error: OSError) -> Failure:
    match error:
        case ConnectionRefusedError():
            return Failure("connection refused", str(error))
        case ConnectionResetError() | BrokenPipeError():
            return Failure("connection reset", str(error))
    return Failure("no connection", str(error))
