"""Writes a reply as a response: one object, or the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from minisrv.errors import MinisrvError
from minisrv.frontend.apis.responses.output_items import OutputItems, StreamEvent
from minisrv.frontend.apis.responses.tools import Callee
from minisrv.frontend.generation.event_reader import Usage
from minisrv.frontend.generation.pieces import Piece, finish_of
from minisrv.frontend.generation.renderer import Choice, Renderer
from minisrv.frontend.http.sse import named_sse
from minisrv.wire.events import Event

Keep = Callable[[dict[str, Any]], None]


class ResponseRenderer(Renderer):
    """One choice. The order of a stream: created, in_progress; for each item its added, deltas and
    done; then one of completed, incomplete and failed. There is no [DONE].
    """

    def __init__(
        self,
        id: str,
        model: str,
        echoed: dict[str, Any],
        callee: Callable[[str], Callee],
        keep: Keep | None = None,
    ) -> None:
        """echoed: what every state of the response repeats of the request.

        callee: the tool of a name that the model calls. keep: takes the response when it has ended,
        before the client has it.
        """
        super().__init__()
        self._id = id
        self._model = model
        self._keep = keep
        self._echoed = echoed
        self._created = int(time.time())
        self._items = OutputItems(callee)
        self._status = "in_progress"
        self._num_events = 0

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        ((_, pieces),) = choices
        self._write(pieces)
        return self._ended_body()

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        return self._begin_once() + self._frames(self._write(pieces))

    def end(self, timings: dict[str, Any] | None) -> bytes:
        """The last event, with the whole response."""
        return self._frames([{"type": f"response.{self._status}", "response": self._ended_body()}])

    def failed(self, error: MinisrvError) -> bytes:
        """The last event; what the model wrote is in the events before it."""
        begin = self._begin_once()
        response = {**self._body(), "status": "failed", "output": [], "error": _error_body(error)}
        return begin + self._frames([{"type": "response.failed", "response": response}])

    def _begin_once(self) -> bytes:
        if self._num_events:
            return b""
        names = ("created", "in_progress")
        return self._frames(
            [{"type": f"response.{name}", "response": self._body()} for name in names]
        )

    def _write(self, pieces: Sequence[Piece]) -> list[StreamEvent]:
        if finish := finish_of(pieces):
            self._status = "incomplete" if finish.reason == "length" else "completed"
        return [event for piece in pieces for event in self._items.events(piece)]

    def _frames(self, events: Sequence[StreamEvent]) -> bytes:
        frames = []
        for event in events:
            frames.append(named_sse({**event, "sequence_number": self._num_events}))
            self._num_events += 1
        return b"".join(frames)

    def _ended_body(self) -> dict[str, Any]:
        body = self._body()
        if self._keep is not None:
            self._keep(body)
        return body

    def _body(self) -> dict[str, Any]:
        """The response in its present state; output and usage when it has ended."""
        ended = self._status != "in_progress"
        reason = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "error": None,
            "incomplete_details": reason,
            "model": self._model,
            "output": self._items.ended if ended else [],
            "usage": _usage_body(self.usage) if ended else None,
            **self._echoed,
        }


def _error_body(error: MinisrvError) -> dict[str, Any]:
    """The API knows few codes; `type` and `param` mean the same as in other errors."""
    return {
        "code": "invalid_prompt" if error.http_status < 500 else "server_error",
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
    }


def _usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # Writing to the cache costs nothing here, so it is not counted.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }
