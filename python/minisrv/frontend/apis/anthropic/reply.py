"""Writes the reply to a message request, whole or as a stream of named events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisrv.errors import MinisrvError
from minisrv.frontend.apis.anthropic.blocks import ContentBlocks, StreamEvent, join_blocks
from minisrv.frontend.apis.anthropic.errors import AnthropicErrorFormat
from minisrv.frontend.generation.pieces import Finish, Piece
from minisrv.frontend.generation.renderer import Choice
from minisrv.frontend.generation.usage import Usage
from minisrv.frontend.http.sse import named_sse
from minisrv.frontend.registry.events import Event

MESSAGE_PREFIX = "msg_"


class MessageRenderer:
    """One choice. The order of a stream: message_start; for each block its start, deltas and stop;
    message_delta with stop reason and usage; message_stop.
    """

    def __init__(self, request_id: str, model: str, *, show_reasoning: bool) -> None:
        self.usage = Usage(choices_per_prompt=1)
        self._request_id = request_id
        self._model = model
        self._blocks = ContentBlocks(show_reasoning=show_reasoning)
        self._started = False

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        ((_, pieces),) = choices
        finish = pieces[-1]
        assert isinstance(finish, Finish)
        content = join_blocks(event for piece in pieces for event in self._blocks.events(piece))
        return {**self._head(), "content": content, **_stop(finish)}

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        """The named events that an event adds."""
        events: list[StreamEvent] = []
        if not self._started:
            self._started = True
            events.append({"type": "message_start", "message": self._head()})
        for piece in pieces:
            events += self._blocks.events(piece)
            if isinstance(piece, Finish):
                usage = _usage_body(self.usage)
                events.append({"type": "message_delta", "delta": _stop(piece), "usage": usage})
        return b"".join(map(named_sse, events))

    def end(self, timings: dict[str, Any] | None) -> bytes:
        """The last event."""
        return named_sse({"type": "message_stop"})

    def failed(self, error: MinisrvError) -> bytes:
        """An error event."""
        return named_sse(AnthropicErrorFormat().body(error, self._request_id))

    def ping(self) -> bytes:
        """A ping event."""
        return named_sse({"type": "ping"})

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"{MESSAGE_PREFIX}{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage_body(self.usage),
        }


def _stop(finish: Finish) -> dict[str, str | None]:
    sequence: str | None = None
    if finish.reason == "tool_calls":
        reason = "tool_use"
    elif finish.reason == "length":
        reason = "max_tokens"
    elif isinstance(finish.stop_reason, str):
        reason, sequence = "stop_sequence", finish.stop_reason
    else:
        reason = "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage_body(usage: Usage) -> dict[str, Any]:
    """As Anthropic counts: the three input counts add up to the prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
