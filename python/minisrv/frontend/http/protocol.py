"""HTTP as uvicorn reads it, with bounds on heads and on clients that do not read, and a drain."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import FrameType

import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from minisrv.errors import InvalidRequestError
from minisrv.frontend.http.error_format import error_body

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
UNREAD_S = 30.0
_DROP_KEY = "minisrv.drop"

logger = logging.getLogger("minisrv.frontend")


def drop_connection_of(scope: Scope) -> Callable[[], None] | None:
    """What closes the connection of a request at once; None under another server."""
    drop: Callable[[], None] | None = scope.get("state", {}).get(_DROP_KEY)
    return drop


class HttpProtocol(HttpToolsProtocol):
    """One connection. The application sees a request only when its head is complete and bounded.

    While the client does not read, uvicorn makes the application wait. When it has read nothing at
    all for UNREAD_S, the connection is closed, which aborts its request.
    """

    _in_head = False
    _begun = False  # whether the head begins in the data at hand
    _too_large = False
    _head_bytes = 0
    _unread_timer: asyncio.TimerHandle | None = None
    _cycles: Sequence[RequestResponseCycle] = ()

    def pause_writing(self) -> None:
        """The client does not keep up: the buffer is full."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()
        # uvicorn informs only the last of several pipelined requests, which has not begun.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _watch_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < unread:
                return self._watch_reader()
            logger.warning("closed a connection whose client read nothing for %g s", UNREAD_S)
            self.drop()

        self._stop_watching()
        self._unread_timer = self.loop.call_later(UNREAD_S, look)

    def _stop_watching(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def drop(self) -> None:
        """Close the connection without sending what the client has not read."""
        self.transport.abort()

    @property
    def is_busy(self) -> bool:
        """Whether a request that arrived whole waits for its reply, or a reply for its reader."""
        if self.pipeline or self.transport.get_write_buffer_size():
            return True
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return cycle.response_started or not cycle.more_body

    def data_received(self, data: bytes) -> None:
        """Parse the data; refuse a head that grows too large before it is complete."""
        # Data in which a head begins may also hold the end of another request; it is bounded.
        self._begun = False
        super().data_received(data)
        if self._in_head and not self._begun and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._too_large = True
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][_DROP_KEY] = self.drop
        self._in_head, self._begun, self._head_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._too_large = True
            raise ValueError("the head is too large")  # becomes a parsing error
        super().on_headers_complete()
        open_cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles = [*open_cycles, self.cycle]

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, and close."""
        status = HTTPStatus.BAD_REQUEST
        if self._too_large:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            msg = f"a request's head may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
        body = json.dumps(error_body(InvalidRequestError(msg)))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write((head + body).encode("ascii"))
        self.transport.close()


class HttpServer(uvicorn.Server):
    """Listens until `should_exit` is set; signals are the supervisor's."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore a signal."""

    @property
    def is_idle(self) -> bool:
        """Whether every reply to a request that arrived whole has left this process."""
        return not any(connection.is_busy for connection in self._connections)

    def announce_close(self) -> None:
        """Have every reply that has not begun close its connection, so that none is reused."""
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        for connection in self._connections:
            last = connection.cycle  # those before it in the pipeline must not close
            if last is not None and not last.response_started:
                last.keep_alive = False

    @property
    def _connections(self) -> list[HttpProtocol]:
        return [c for c in self.server_state.connections if isinstance(c, HttpProtocol)]
