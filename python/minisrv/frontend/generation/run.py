"""Runs one generation: submits it, watches the client, replies through a renderer, counts, logs.

The status line waits for the first output, so that a request refused by a process behind the
frontend gets a 4xx instead of a broken stream. After FIRST_PING_S of silence the stream is opened
anyway, since proxies cut idle connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv import log
from minisrv.errors import MinisrvError
from minisrv.frontend.generation.event_reader import ChoiceReader
from minisrv.frontend.generation.groups import CHOICES_AT_ONCE, in_groups
from minisrv.frontend.generation.renderer import Renderer, read_choice
from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.generation.timings import RequestTimings
from minisrv.frontend.http.access import key_number_of
from minisrv.frontend.http.context import CLIENT_GONE, context_of
from minisrv.frontend.http.protocol import drop_connection_of
from minisrv.frontend.http.sse import encode_json, json_bytes
from minisrv.frontend.registry.open_request import RequestAborted
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.events import Event, failure_error

if TYPE_CHECKING:
    from minisrv.frontend.generation.tracing import Tracer

logger = logging.getLogger("minisrv.frontend")

FIRST_PING_S = 5.0
PING_S = 15.0


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs the generation requests of all APIs. count_request: called when one has ended.

    fair_keys: messages carry the number of the key that sent them. tracer: with --otlp-endpoint.
    """

    registry: RequestRegistry
    max_open_requests: int
    count_request: Callable[[RequestTimings], Awaitable[None]]
    fair_keys: bool = False
    tracer: Tracer | None = None

    def response(self, request: GenerationRequest, renderer: Renderer) -> Response:
        """A response that runs the request when it is sent.

        Raises InvalidRequestError for more choices than the server can run at once.
        """
        request.check_fits(self.max_open_requests)
        return _GenerationResponse(self, request, renderer)


class _GenerationResponse(Response):
    """Opens the request at the registry, sends the reply, and closes it however it ends."""

    def __init__(self, runner: Runner, request: GenerationRequest, renderer: Renderer) -> None:
        if request.reply.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            super().__init__(headers=headers, media_type="text/event-stream")
        else:
            super().__init__(media_type="application/json")
        del self.headers["content-length"]
        self._runner = runner
        self._registry = runner.registry
        self._request = request
        self._renderer = renderer
        self._prompt_lengths: list[int] = []
        self._readers = [
            ChoiceReader(request.calls) for _ in range(request.num_choices * request.reply.stream)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply. Raises MinisrvError for a failure before any output."""
        await asyncio.sleep(0)  # to read a large request took long; others run before it is packed
        context = self._context = context_of(scope)
        context.warnings += self._request.warnings
        self._timings = RequestTimings(self._request.num_choices, context.arrived_at)
        drop_reader = drop_connection_of(scope) if self._request.reply.stream else None
        base = self._registry.open(
            self._request.num_choices, context.request_id, drop_reader=drop_reader
        )
        self._error: Exception | None = None
        tracer = self._runner.tracer
        self._trace = tracer.begin(self._request, scope, self._timings) if tracer else None
        self._log_start()
        watch = asyncio.create_task(self._abort_when_gone(receive, base))
        try:
            key = key_number_of(scope) if self._runner.fair_keys else 0
            async for messages in in_groups(self._request.tokenize_messages(base)):
                for message in messages:
                    self._registry.send(replace(message, key=key) if key else message)
            if self._request.reply.stream:
                await self._send_stream(send, base)
            else:
                await self._send_whole(send, base)
        except RequestAborted:
            context.status = CLIENT_GONE
            self._timings.failure_reason = "abort"
        except Exception as error:
            self._note_failure(error)
            raise
        finally:
            watch.cancel()
            self._abort(base)
            context.log_values = self._log_values()
            if self._trace is not None:
                self._trace.end(self._timings, self._renderer.usage, self._error)
            await self._runner.count_request(self._timings)

    async def _abort_when_gone(self, receive: Receive, base: int) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._abort(base)

    def _abort(self, base: int) -> None:
        """End the request if it has not ended, and count the output that was not read."""
        self._count_unsent(self._registry.unread(base))
        self._note_prompts(base)
        self._registry.abort(base)

    def _note_prompts(self, base: int) -> None:
        """Note the lengths of the prompts while the request is open."""
        self._prompt_lengths = self._registry.prompt_lengths(base) or self._prompt_lengths

    async def _send_whole(self, send: Send, base: int) -> None:
        events = await self._registry.all_events(base)
        async for group in in_groups(events):
            self._count(group)
        self._raise_failure(events)
        body = await self._whole_body(sorted(events, key=lambda event: event.index))
        self.headers["content-length"] = str(len(body))
        await self._start(send, ended=True)
        await _send_body(send, body)

    async def _whole_body(self, events: list[Event]) -> bytes:
        timings, reply, written = self._shown_timings(), {}, []
        async for group in in_groups(events):
            choices = [read_choice(self._request, self._renderer, event) for event in group]
            reply = self._renderer.whole(choices, timings)
            if len(events) > CHOICES_AT_ONCE:
                written.append(encode_json(reply.pop("choices"))[1:-1])
        if not written:
            return json_bytes(reply)
        return f'{encode_json(reply)[:-1]},"choices":[{",".join(written)}]}}'.encode()

    async def _send_stream(self, send: Send, base: int) -> None:
        events = await self._registry.next_events(base, FIRST_PING_S)
        self._note_prompts(base)
        self._count(events)
        self._raise_failure(events)
        await self._start(send, ended=False)
        send = self._context.send_to_client
        try:
            await self._send_events(send, base, events)
        except RequestAborted:
            raise
        except Exception as error:
            self._note_failure(error)
            if not isinstance(error, MinisrvError):
                logger.exception("stream failed id=%s", self._context.request_id)
                error = self._context.internal_error()
            self._context.names.name_field_of(error)
            await _send_body(send, self._renderer.failed(error))

    async def _send_events(self, send: Send, base: int, events: list[Event]) -> None:
        while True:
            data = b"".join([self._chunk(event) for event in events if event.failure is None])
            if any(event.failure for event in events):
                await _send_body(send, data, more=True)
                self._raise_failure(events)
            if not self._registry.is_open(base):
                return await _send_body(send, data + self._renderer.end(self._shown_timings()))
            # An event may add nothing yet: text is held back while it may begin a tool call.
            if data or not events:
                await _send_body(send, data or self._renderer.ping(), more=True)
            events = await self._registry.next_events(base, PING_S)
            self._count(events)

    def _chunk(self, event: Event) -> bytes:
        self._renderer.usage.count(event)
        return self._renderer.chunk(event, self._readers[event.index].read(event))

    def _raise_failure(self, events: list[Event]) -> None:
        """Raise the first failure, which names its prompt if there are several."""
        for event in events:
            if event.failure is not None:
                self._count_unsent(events)
                error = failure_error(event.failure)
                if self._request.num_prompts > 1 and error.param == "prompt":
                    error.rename_field(f"prompt.{event.index // self._request.sampling.n}")
                raise error

    def _count(self, events: list[Event]) -> None:
        for event in events:
            if event.start is not None or event.final:
                self._timings.add(event)

    def _count_unsent(self, events: list[Event]) -> None:
        self._count(events)
        for event in events:
            self._renderer.usage.count(event)

    def _note_failure(self, error: Exception) -> None:
        self._error = error
        aborted = isinstance(error, MinisrvError) and error.code == "request_aborted"
        self._timings.failure_reason = "abort" if aborted else "error"

    def _shown_timings(self) -> dict[str, Any] | None:
        return self._timings.timings() if self._request.reply.timings else None

    async def _start(self, send: Send, *, ended: bool) -> None:
        if (warning := self._cap_warning()) is not None:
            self._context.warnings.append(warning)
        figures = [self._timings.server_timing(ended=ended)]
        if self._trace is not None:
            figures.append(f'traceparent;desc="{self._trace.traceparent}"')
        if timing := ", ".join(filter(None, figures)):
            self.headers["Server-Timing"] = timing
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    def _cap_warning(self) -> str | None:
        """For the header: the reply ends when the context is full, before max_tokens."""
        starts = [choice.start for choice in self._timings.choices.values()]
        lengths = {*(start.prompt_tokens for start in starts), *self._prompt_lengths}
        caps = [self._request.output_cap(length) for length in lengths]
        rooms = [cap for cap in caps if cap is not None]
        if not rooms:
            return None
        name, asked = self._context.names.own("max_tokens"), self._request.sampling.max_tokens
        return f"{name} is {asked}, but the context ends the reply after {min(rooms)} tokens"

    def _log_start(self) -> None:
        sampling = self._request.sampling
        values = {
            "id": self._context.request_id,
            "prompts": self._request.num_prompts,
            "n": sampling.n,
            "max_tokens": sampling.max_tokens,
            "stream": self._request.reply.stream,
            "open": self._registry.num_open,
        }
        log.event(logger, logging.INFO, "started", values)

    def _log_values(self) -> dict[str, Any]:
        """For the last line of the request in the log."""
        usage, reason = self._renderer.usage, self._timings.failure_reason
        return {
            **({} if reason is None else {"ended": reason}),
            "choices": self._request.num_choices,
            "prompt": usage.prompt_tokens or sum(self._prompt_lengths),
            "cached": usage.cached_tokens,
            "output": usage.output_tokens,
            **self._timings.log_values(),
            **({} if self._trace is None else {"trace": self._trace.trace_id}),
        }


async def _send_body(send: Send, data: bytes, *, more: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
