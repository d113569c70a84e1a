"""Carries one request through: submit, watch the client, and answer whole or as a stream.

The status waits for the first output, so that a refusal from behind is a 4xx and no broken stream;
only after FIRST_PING_S of silence is the stream opened, for proxies cut idle connections.
"""

from __future__ import annotations

import asyncio
import logging
import re
from functools import cached_property
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv import log
from minisrv.errors import MinisrvError
from minisrv.frontend.apis.openai.render import (
    DONE,
    PING,
    ReplyHeader,
    StreamReply,
    Usage,
    json_bytes,
    sse,
    whole_reply,
)
from minisrv.frontend.fields.names import Names, renamed
from minisrv.frontend.generation.request import Generation
from minisrv.frontend.generation.timings import RequestTimings
from minisrv.frontend.http.context import CLIENT_GONE, RequestContext
from minisrv.frontend.http.errors import error_body
from minisrv.frontend.ops.metrics import ServerMetrics
from minisrv.frontend.registry.events import Event
from minisrv.frontend.registry.open_request import RequestAborted
from minisrv.frontend.registry.registry import RequestRegistry

logger = logging.getLogger("minisrv.frontend")

SERVER_TIMING_HEADER = "Server-Timing"
FIRST_PING_S = 5.0
PING_S = 15.0


class GenerationResponse(Response):
    """Opens the request at the registry, answers, and closes it however it ends.

    timings: end the reply with what it took.
    """

    def __init__(
        self,
        registry: RequestRegistry,
        generation: Generation,
        header: ReplyHeader,
        context: RequestContext,
        headers: dict[str, str],
        metrics: ServerMetrics,
        *,
        timings: bool = False,
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
        self._metrics = metrics
        self._timings = timings
        self._figures = RequestTimings(generation.num_choices, context.arrived_at)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises MinisrvError for a failure that came before any output."""
        base = self._registry.open(self._generation.num_choices, self._context.request_id)
        self._log_start()
        watch = asyncio.create_task(self._abort_when_gone(receive, base))
        try:
            for message in self._generation.tokenize_messages(base):
                self._registry.send(message)
            if self._generation.stream:
                await self._send_stream(send, base)
            else:
                await self._send_whole(send, base)
        except RequestAborted:
            self._context.status = CLIENT_GONE
            self._figures.failure_reason = "abort"
        except Exception as error:
            self._note_failure(error)
            raise
        finally:
            watch.cancel()
            self._abort(base)
            self._context.figures = self._log_values()
            self._metrics.count_request(self._figures)

    async def _abort_when_gone(self, receive: Receive, base: int) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._abort(base)

    def _abort(self, base: int) -> None:
        """End it, if it has not ended, and count what nobody will read."""
        self._take_unsent(self._registry.unread(base))
        self._registry.abort(base)

    async def _send_whole(self, send: Send, base: int) -> None:
        events = await self._registry.all_events(base)
        self._take(events)
        self._raise_failure(events)
        value = self._whole(events)
        if self._timings:
            value["timings"] = self._figures.timings()
        body = json_bytes(value)
        self.headers["content-length"] = str(len(body))
        await self._start(send, ended=True)
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send, base: int) -> None:
        events = await self._registry.next_events(base, FIRST_PING_S)
        self._take(events)
        self._raise_failure(events)
        await self._start(send, ended=False)
        try:
            await self._send_events(send, base, events)
        except MinisrvError as error:
            self._note_failure(error)
            await _send_last(send, self._failed(error))
        except RequestAborted:
            raise
        except Exception as error:
            self._note_failure(error)
            logger.exception("stream failed id=%s", self._context.request_id)
            await _send_last(send, self._failed(self._context.internal_error()))

    async def _send_events(self, send: Send, base: int, events: list[Event]) -> None:
        while True:
            data = b"".join([self._chunks(event) for event in events if not event.failure])
            if any(event.failure for event in events):
                await _send(send, data)
                self._raise_failure(events)
            if not self._registry.is_open(base):
                timings = self._timings_chunk() if self._timings else b""
                return await _send_last(send, data + timings + self._end())
            # An event may add nothing yet: its text is held back while it may begin a tool call.
            if data or not events:
                await _send(send, data or self._ping())
            events = await self._registry.next_events(base, PING_S)
            self._take(events)

    def _raise_failure(self, events: list[Event]) -> None:
        """Raise the first failure, which names its prompt if there are several."""
        if any(event.failure for event in events):
            self._take_unsent(events)
        names: Names = ()
        for event in events:
            if self._generation.num_prompts > 1:
                place = event.index // self._generation.sampling.n
                names = ((re.compile(r"^prompt\b"), f"prompt.{place}"),)
            with renamed(names):
                event.raise_failure()

    def _whole(self, events: list[Event]) -> dict[str, Any]:
        return whole_reply(self._header, events, self._usage)

    def _chunks(self, event: Event) -> bytes:
        return self._stream.chunks(event)

    def _end(self) -> bytes:
        return self._stream.end()

    def _failed(self, error: MinisrvError) -> bytes:
        """What ends a stream that cannot go on."""
        return sse(error_body(error)) + DONE

    def _ping(self) -> bytes:
        """What keeps a silent stream open."""
        return PING

    @cached_property
    def _stream(self) -> StreamReply:
        assert self._generation.stream is not None
        return StreamReply(self._header, self._usage, self._generation.stream)

    def _timings_chunk(self) -> bytes:
        """A chunk without choices, before the one with the usage."""
        assert self._generation.stream is not None
        object_name = "chat.completion.chunk" if self._header.chat else "text_completion"
        chunk = self._header.reply(object_name, []) | {"timings": self._figures.timings()}
        if self._generation.stream.include_usage:
            chunk["usage"] = None
        return sse(chunk)

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if event.start is not None or event.final:
                self._figures.add(event)

    def _take_unsent(self, events: list[Event]) -> None:
        """Count what is not sent."""
        self._take(events)
        for event in events:
            self._usage.add(event)

    def _note_failure(self, error: Exception) -> None:
        aborted = isinstance(error, MinisrvError) and error.code == "request_aborted"
        self._figures.failure_reason = "abort" if aborted else "error"

    async def _start(self, send: Send, *, ended: bool) -> None:
        timing = self._figures.server_timing(ended=ended)
        if timing is not None:
            self.headers[SERVER_TIMING_HEADER] = timing
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    def _log_start(self) -> None:
        sampling = self._generation.sampling
        figures = {
            "id": self._context.request_id,
            "prompts": self._generation.num_prompts,
            "n": sampling.n,
            "max_tokens": sampling.max_tokens,
            "stream": self._generation.stream is not None,
            "open": self._registry.num_open,
        }
        log.event(logger, logging.INFO, "started", figures)

    def _log_values(self) -> dict[str, Any]:
        """For the request's last line in the log."""
        usage, reason = self._usage, self._figures.failure_reason
        return {
            **({} if reason is None else {"ended": reason}),
            "choices": self._generation.num_choices,
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "output": usage.output_tokens,
            **self._figures.log_values(),
        }


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _send_last(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data})
