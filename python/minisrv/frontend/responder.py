"""Carries one request through: submit, watch the client, and answer whole or as a stream.

The status waits for the first output, so that a refusal from behind is a 4xx and no broken stream;
only after FIRST_PING_S of silence is the stream opened, for proxies cut idle connections.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.errors import MinisrvError
from minisrv.frontend.events import Event
from minisrv.frontend.generation import Generation
from minisrv.frontend.http_errors import error_body
from minisrv.frontend.request_context import CLIENT_GONE, RequestContext
from minisrv.frontend.request_registry import RequestAborted, RequestRegistry
from minisrv.frontend.stream import (
    DONE,
    PING,
    ReplyHeader,
    StreamReply,
    Usage,
    json_bytes,
    sse,
    whole_reply,
)

logger = logging.getLogger("minisrv.frontend")

FIRST_PING_S = 5.0
PING_S = 15.0


class GenerationResponse(Response):
    """Opens the request at the registry, answers, and closes it however it ends."""

    def __init__(
        self,
        registry: RequestRegistry,
        generation: Generation,
        header: ReplyHeader,
        context: RequestContext,
        headers: dict[str, str],
    ) -> None:
        if generation.stream:
            headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        kind = "text/event-stream" if generation.stream else "application/json"
        super().__init__(headers=headers, media_type=kind)
        del self.headers["content-length"]
        self._registry = registry
        self._generation = generation
        self._header = header
        self._context = context
        self._usage = Usage(header)
        self._opened = time.monotonic()
        self._first_output: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises MinisrvError for a failure that came before any output."""
        base = self._registry.open(self._generation.num_choices)
        watch = asyncio.create_task(self._abort_when_gone(receive, base))
        try:
            for message in self._generation.tokenize_messages(base, self._registry.epoch):
                self._registry.send(message)
            if self._generation.stream:
                await self._send_stream(send, base)
            else:
                await self._send_whole(send, base)
        except RequestAborted:
            self._context.status = CLIENT_GONE
        finally:
            watch.cancel()
            self._registry.abort(base)
            self._context.figures = self._figures()

    async def _abort_when_gone(self, receive: Receive, base: int) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._registry.abort(base)

    async def _send_whole(self, send: Send, base: int) -> None:
        events = await self._registry.all_events(base)
        _raise_failure(events)
        body = json_bytes(whole_reply(self._header, events, self._usage))
        self.headers["content-length"] = str(len(body))
        await self._start(send)
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send, base: int) -> None:
        events = await self._registry.next_events(base, FIRST_PING_S)
        _raise_failure(events)
        await self._start(send)
        try:
            await self._send_events(send, base, events)
        except MinisrvError as error:
            await _send_last(send, sse(error_body(error)) + DONE)
        except RequestAborted:
            raise
        except Exception:
            logger.exception("stream failed id=%s", self._context.request_id)
            await _send_last(send, sse(error_body(self._context.internal_error())) + DONE)

    async def _send_events(self, send: Send, base: int, events: list[Event]) -> None:
        assert self._generation.stream is not None
        reply = StreamReply(self._header, self._usage, self._generation.stream)
        while True:
            if events and self._first_output is None:
                self._first_output = time.monotonic()
            data = b"".join([reply.chunks(event) for event in events if not event.failure])
            if any(event.failure for event in events):
                await _send(send, data)
                _raise_failure(events)
            if not self._registry.is_open(base):
                return await _send_last(send, data + reply.end())
            # An event may add nothing yet: its text is held back while it may begin a tool call.
            if data or not events:
                await _send(send, data or PING)
            events = await self._registry.next_events(base, PING_S)

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    def _figures(self) -> str:
        """For the request's line in the log."""
        usage = self._usage
        figures = (
            f"choices={self._generation.num_choices} prompt={usage.prompt_tokens} "
            f"cached={usage.cached_tokens} output={usage.output_tokens}"
        )
        if self._first_output is not None:
            figures += f" first_ms={(self._first_output - self._opened) * 1000:.0f}"
        return figures


def _raise_failure(events: list[Event]) -> None:
    for event in events:
        event.raise_failure()


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _send_last(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data})
