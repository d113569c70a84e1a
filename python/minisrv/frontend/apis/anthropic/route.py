"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, without any state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.errors import MinisrvError
from minisrv.frontend.apis.anthropic.blocks import ContentBlocks, StreamEvent, join_blocks
from minisrv.frontend.apis.anthropic.errors import ERROR_SCHEMA, AnthropicErrorFormat
from minisrv.frontend.apis.anthropic.fields import COUNT_FIELDS, MESSAGES_FIELDS
from minisrv.frontend.apis.anthropic.reading import NAMES, read_message_request, read_prompt
from minisrv.frontend.apis.service import Service
from minisrv.frontend.generation.event_reader import Usage
from minisrv.frontend.generation.pieces import Finish, Piece, finish_of
from minisrv.frontend.generation.renderer import Choice, Renderer
from minisrv.frontend.generation.request import ChatRequest
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import EXAMPLE_MESSAGES, errors, request_body
from minisrv.frontend.http.sse import named_sse
from minisrv.wire.events import Event

MESSAGES_PATH = "/v1/messages"
MESSAGE_PREFIX = "msg_"


def add_message_routes(app: FastAPI, service: Service) -> None:
    registry, bodies = service.registry, service.bodies
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503, schema=ERROR_SCHEMA)

    @app.post(
        MESSAGES_PATH,
        openapi_extra=request_body(
            MESSAGES_FIELDS, {"max_tokens": 50, "messages": EXAMPLE_MESSAGES}
        ),
        responses=statuses,
    )
    async def create_message(request: Request) -> Response:
        """Answer a conversation, in Anthropic's form."""
        model = registry.model
        fields = await bodies.read_generation(request, MESSAGES_FIELDS)
        context = context_of(request.scope)
        context.names = NAMES
        chat = read_message_request(fields, model)
        show_reasoning = fields.get("thinking", {}).get("display") != "omitted"
        renderer = MessageRenderer(context.request_id, chat, show_reasoning=show_reasoning)
        return service.runner.response(chat, renderer)

    @app.post(
        f"{MESSAGES_PATH}/count_tokens",
        openapi_extra=request_body(COUNT_FIELDS, {"messages": EXAMPLE_MESSAGES}),
        responses=statuses,
    )
    async def count_message_tokens(request: Request) -> Response:
        """The number of tokens in the prompt, as the template writes it."""
        fields = await bodies.read(request, COUNT_FIELDS)
        context_of(request.scope).names = NAMES
        prompt = read_prompt(fields, registry.model)
        return JSONResponse({"input_tokens": await service.count(request, prompt)})


class MessageRenderer(Renderer):
    """One choice. The order of a stream: message_start; for each block its start, deltas and stop;
    message_delta with stop reason and usage; message_stop.
    """

    def __init__(self, request_id: str, request: ChatRequest, *, show_reasoning: bool) -> None:
        super().__init__()
        self._request_id = request_id
        self._request = request
        self._blocks = ContentBlocks(show_reasoning=show_reasoning)
        self._started = False

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        ((_, pieces),) = choices
        content = join_blocks(event for piece in pieces for event in self._blocks.events(piece))
        return {**self._head(), "content": content, **self._stop(finish_of(pieces))}

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        events: list[StreamEvent] = []
        if not self._started:
            self._started = True
            events.append({"type": "message_start", "message": self._head()})
        for piece in pieces:
            events += self._blocks.events(piece)
        if finish := finish_of(pieces):
            usage = _usage_body(self.usage)
            events.append({"type": "message_delta", "delta": self._stop(finish), "usage": usage})
        return b"".join(map(named_sse, events))

    def end(self, timings: dict[str, Any] | None) -> bytes:
        return named_sse({"type": "message_stop"})

    def failed(self, error: MinisrvError) -> bytes:
        return named_sse(AnthropicErrorFormat().body(error, self._request_id))

    def ping(self) -> bytes:
        return named_sse({"type": "ping"})

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"{MESSAGE_PREFIX}{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            **self._stop(None),
            "usage": _usage_body(self.usage),
        }

    def _stop(self, finish: Finish | None) -> dict[str, str | None]:
        reason: str | None
        match finish:
            case None:
                reason = None
            case Finish("tool_calls"):
                reason = "tool_use"
            case Finish("length"):
                capped = self._request.output_cap(self.usage.prompt_tokens) is not None
                reason = "model_context_window_exceeded" if capped else "max_tokens"
            case Finish("stop", str(sequence)):
                return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
            case Finish():
                reason = "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}


def _usage_body(usage: Usage) -> dict[str, Any]:
    """As Anthropic counts: the three input counts add up to the prompt."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
