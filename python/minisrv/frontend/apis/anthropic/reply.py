"""Answers a message request, whole or as a stream of named events.

The order on the wire: message_start; for each block its start, deltas and stop; message_delta with
stop reason and usage; message_stop.
"""

from __future__ import annotations

from typing import Any

from minisrv.errors import MinisrvError
from minisrv.frontend.apis.anthropic.blocks import ContentBlocks, StreamEvent, join
from minisrv.frontend.apis.anthropic.errors import messages_error
from minisrv.frontend.apis.openai.render import Usage, json_bytes
from minisrv.frontend.generation.assistant_message import AssistantMessage
from minisrv.frontend.generation.run import GenerationResponse
from minisrv.frontend.registry.events import Event
from minisrv.wire.messages import Finish


class MessagesResponse(GenerationResponse):
    """Answers in Anthropic's shape; there is one choice."""

    show_reasoning = True
    _message: AssistantMessage | None = None

    def _whole(self, events: list[Event]) -> dict[str, Any]:
        (event,) = events
        self._usage.add(event)
        message = self._header.message()
        blocks = self._new_blocks()
        stream = [part for delta in message.deltas(event) for part in blocks.add(delta)]
        content = join([*stream, *blocks.end()])
        return {**self._head(), "content": content, **_stop(event, message)}

    def _chunks(self, event: Event) -> bytes:
        self._usage.add(event)
        events: list[StreamEvent] = []
        if self._message is None:
            self._message = self._header.message()
            self._blocks = self._new_blocks()
            events.append({"type": "message_start", "message": self._head()})
        for delta in self._message.deltas(event):
            events += self._blocks.add(delta)
        if event.final:
            events += self._blocks.end()
            stop = _stop(event, self._message)
            events.append({"type": "message_delta", "delta": stop, "usage": _usage(self._usage)})
        return b"".join(map(named_sse, events))

    def _end(self) -> bytes:
        return named_sse({"type": "message_stop"})

    def _failed(self, error: MinisrvError) -> bytes:
        return named_sse(messages_error(error, self._context.request_id))

    def _ping(self) -> bytes:
        return named_sse({"type": "ping"})

    def _new_blocks(self) -> ContentBlocks:
        return ContentBlocks(show_reasoning=self.show_reasoning)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._header.id,
            "type": "message",
            "role": "assistant",
            "model": self._header.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._usage),
        }


def named_sse(event: StreamEvent) -> bytes:
    """A server-sent event under the name of its type."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), json_bytes(event))


def _stop(event: Event, message: AssistantMessage) -> dict[str, str | None]:
    sequence: str | None = None
    if message.calls_tools(event):
        reason = "tool_use"
    elif event.finish is Finish.LENGTH:
        reason = "max_tokens"
    elif isinstance(event.stop_reason, str):
        reason, sequence = "stop_sequence", event.stop_reason
    else:
        reason = "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(usage: Usage) -> dict[str, Any]:
    """As Anthropic counts: the three parts of the input add up to the prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
