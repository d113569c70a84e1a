"""Answers in the shape of the Responses API: one object, or its events.

The order of a stream: created, in_progress; for each item its added, deltas and done; then one of
completed, incomplete and failed. There is no [DONE].
"""

from __future__ import annotations

import time
from typing import Any

from starlette.types import Receive, Scope, Send

from minisrv.errors import MinisrvError
from minisrv.frontend.apis.openai.render import ReplyHeader, Usage, sse
from minisrv.frontend.apis.responses.output_items import OutputItems, StreamEvent
from minisrv.frontend.apis.responses.reading import named_as_here, rename
from minisrv.frontend.generation.request import Generation
from minisrv.frontend.generation.run import GenerationResponse
from minisrv.frontend.http.context import RequestContext
from minisrv.frontend.ops.metrics import ServerMetrics
from minisrv.frontend.registry.events import Event
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import Finish


class ResponseReply(GenerationResponse):
    """Answers one request. `echoed`: what every state of the response has alike."""

    def __init__(
        self,
        registry: RequestRegistry,
        generation: Generation,
        header: ReplyHeader,
        context: RequestContext,
        headers: dict[str, str],
        metrics: ServerMetrics,
        *,
        echoed: dict[str, Any],
    ) -> None:
        super().__init__(registry, generation, header, context, headers, metrics)
        self._echoed = echoed
        self._message = header.message()
        self._items = OutputItems()
        self._status = "in_progress"
        self._num_events = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises MinisrvError, in the names of a response's fields."""
        with named_as_here():
            await super().__call__(scope, receive, send)

    def _whole(self, events: list[Event]) -> dict[str, Any]:
        (event,) = events
        self._add(event)
        return self._body()

    def _chunks(self, event: Event) -> bytes:
        begin = b"" if self._num_events else self._begin()
        return begin + self._frames(self._add(event))

    def _end(self) -> bytes:
        return self._frames([{"type": f"response.{self._status}", "response": self._body()}])

    def _failed(self, error: MinisrvError) -> bytes:
        """What the model has said stays in the events before."""
        begin = b"" if self._num_events else self._begin()
        response = {**self._body(), "status": "failed", "output": [], "error": _error(error)}
        return begin + self._frames([{"type": "response.failed", "response": response}])

    def _begin(self) -> bytes:
        names = ("created", "in_progress")
        return self._frames(
            [{"type": f"response.{name}", "response": self._body()} for name in names]
        )

    def _add(self, event: Event) -> list[StreamEvent]:
        self._usage.add(event)
        added = [self._items.add(delta) for delta in self._message.deltas(event)]
        events = [stream_event for some in added for stream_event in some]
        if event.final:
            cut = event.finish is Finish.LENGTH and not self._message.calls_tools(event)
            self._status = "incomplete" if cut else "completed"
            last_cut = self._message.in_call if self._items.in_call else cut
            events += self._items.end("incomplete" if last_cut else "completed")
        return events

    def _frames(self, events: list[StreamEvent]) -> bytes:
        frames = []
        for event in events:
            name = f"event: {event['type']}\n".encode()
            frames.append(name + sse({**event, "sequence_number": self._num_events}))
            self._num_events += 1
        return b"".join(frames)

    def _body(self) -> dict[str, Any]:
        """The response as it is now; what has ended of it, and at its end the usage."""
        ended = self._status != "in_progress"
        reason = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self._header.id,
            "object": "response",
            "created_at": self._header.created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": reason,
            "model": self._header.model,
            "output": self._items.ended if ended else [],
            "usage": _usage(self._usage) if ended else None,
            **self._echoed,
        }


def _error(error: MinisrvError) -> dict[str, Any]:
    """A response's error has one of few codes; `type` and `param` tell what they do elsewhere."""
    rename(error)
    code = "invalid_prompt" if error.http_status < 500 else "server_error"
    return {
        "code": code,
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    body = usage.body()
    return {
        "input_tokens": body["prompt_tokens"],
        # What is written to the cache costs nothing here: there is no such count.
        "input_tokens_details": {**body["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": body["completion_tokens"],
        "output_tokens_details": body["completion_tokens_details"],
        "total_tokens": body["total_tokens"],
    }
