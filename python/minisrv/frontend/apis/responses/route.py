"""POST /v1/responses, without state: routes that need a stored response answer 404."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.apis.responses.fields import RESPONSE_FIELDS
from minisrv.frontend.apis.responses.left_out import LeftOut
from minisrv.frontend.apis.responses.output_items import OutputItems, StreamEvent
from minisrv.frontend.apis.responses.reading import NAMES, read_response
from minisrv.frontend.apis.responses.tools import Callee, Tools
from minisrv.frontend.apis.service import Service
from minisrv.frontend.fields.table import Field
from minisrv.frontend.generation.event_reader import Usage
from minisrv.frontend.generation.pieces import Piece, finish_of
from minisrv.frontend.generation.renderer import Choice, Renderer
from minisrv.frontend.generation.request import ChatRequest
from minisrv.frontend.http.context import RequestContext, context_of
from minisrv.frontend.http.openapi import errors, request_body
from minisrv.frontend.http.sse import named_sse
from minisrv.wire.events import Event

RESPONSE_PREFIX = "resp_"
_COUNT_NAMES = (
    *("input", "instructions", "model", "tools", "tool_choice", "parallel_tool_calls", "text"),
    *("reasoning", "enable_thinking", "chat_template_kwargs", "previous_response_id"),
    *("conversation", "truncation"),
)
COUNT_FIELDS: dict[str, Field] = {name: RESPONSE_FIELDS[name] for name in _COUNT_NAMES}


def add_response_routes(app: FastAPI, service: Service) -> None:
    """Add answering, counting, and the routes over stored responses."""
    registry, bodies = service.registry, service.bodies

    def read_tools(fields: dict[str, Any], context: RequestContext) -> Tools:
        """The tools of a request, whose errors from now on name its own fields."""
        context.names = NAMES
        tools = Tools(fields, LeftOut(strict=service.config.strict_params))
        context.names = tools.names_in(NAMES)
        return tools

    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post("/v1/responses", openapi_extra=request_body(RESPONSE_FIELDS), responses=statuses)
    async def create_response(request: Request) -> Response:
        """Answer a conversation, in the shape of the Responses API."""
        model = registry.model
        fields = await bodies.read_generation(request, RESPONSE_FIELDS)
        context = context_of(request.scope)
        tools = read_tools(fields, context)
        chat = await read_response(fields, tools, model, _give_way)
        id = RESPONSE_PREFIX + context.request_id
        renderer = ResponseRenderer(id, chat.model, _echo(fields, chat), tools.callee)
        return service.runner.response(chat, renderer)

    @app.post(
        "/v1/responses/input_tokens", openapi_extra=request_body(COUNT_FIELDS), responses=statuses
    )
    async def count_input_tokens(request: Request) -> Response:
        """The number of tokens in the prompt of a response."""
        fields = await bodies.read(request, COUNT_FIELDS)
        context = context_of(request.scope)
        tools = read_tools(fields, context)
        chat = await read_response(fields, tools, registry.model, _give_way)
        num_tokens = await service.count(request, chat.prompt)
        context.warnings += chat.warnings
        return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    _add_stored_routes(app)


async def _give_way() -> None:
    await asyncio.sleep(0)


def _add_stored_routes(app: FastAPI) -> None:
    path, statuses = "/v1/responses/{response_id}", errors(404)

    @app.get(path, responses=statuses)
    @app.delete(path, responses=statuses)
    @app.get(f"{path}/input_items", responses=statuses)
    @app.post(f"{path}/cancel", responses=statuses)
    async def find_response(response_id: str) -> Response:
        """A 404: nothing is stored, and nothing runs in the background."""
        raise InvalidRequestError(
            f"there is no response {response_id[:80]!a}: this server stores none",
            param="response_id",
            status=404,
        )


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
    ) -> None:
        """echoed: what every state of the response repeats of the request.

        callee: the tool of a name that the model calls.
        """
        super().__init__()
        self._id = id
        self._model = model
        self._echoed = echoed
        self._created = int(time.time())
        self._items = OutputItems(callee)
        self._status = "in_progress"
        self._num_events = 0

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        ((_, pieces),) = choices
        self._write(pieces)
        return self._body()

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        return self._begin_once() + self._frames(self._write(pieces))

    def end(self, timings: dict[str, Any] | None) -> bytes:
        """The last event, with the whole response."""
        return self._frames([{"type": f"response.{self._status}", "response": self._body()}])

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


def _echo(fields: Mapping[str, Any], chat: ChatRequest) -> dict[str, Any]:
    """What a response repeats of its request, with the values in effect."""
    text = fields.get("text", {})
    return {
        "background": False,
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": fields.get("metadata", {}),
        "parallel_tool_calls": fields.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": fields.get("reasoning", {}).get("effort"), "summary": None},
        "store": False,
        "temperature": chat.sampling.temperature,
        "text": {
            "format": text.get("format") or {"type": "text"},
            "verbosity": text.get("verbosity"),
        },
        "tool_choice": fields.get("tool_choice", "auto"),
        "tools": [_echo_tool(tool) for tool in fields.get("tools", [])],
        "top_logprobs": 0,
        "top_p": chat.sampling.top_p,
        "truncation": "disabled",
    }


def _echo_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool as it was sent; a function with all fields that the API requires."""
    if tool["type"] != "function":
        return tool
    names = ("type", "name", "description", "parameters", "strict")
    return {name: tool.get(name) for name in names}
