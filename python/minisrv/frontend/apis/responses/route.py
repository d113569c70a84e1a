"""POST /v1/responses, without state: routes that need a stored response answer 404."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.fields import RESPONSE_FIELDS
from minisrv.frontend.apis.responses.reading import NAMES, read_response
from minisrv.frontend.apis.responses.reply import ResponseRenderer
from minisrv.frontend.apis.service import Service
from minisrv.frontend.fields.table import Field
from minisrv.frontend.generation.request import ChatRequest
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import errors, request_body

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
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post("/v1/responses", openapi_extra=request_body(RESPONSE_FIELDS), responses=statuses)
    async def create_response(request: Request) -> Response:
        """Answer a conversation, in the shape of the Responses API."""
        model = registry.model
        fields = await bodies.read_generation(request, RESPONSE_FIELDS)
        context = context_of(request.scope)
        context.names = NAMES
        chat = read_response(fields, model)
        id = RESPONSE_PREFIX + context.request_id
        renderer = ResponseRenderer(id, chat.model, _echo(fields, chat))
        return service.runner.response(chat, renderer)

    @app.post(
        "/v1/responses/input_tokens", openapi_extra=request_body(COUNT_FIELDS), responses=statuses
    )
    async def count_input_tokens(request: Request) -> Response:
        """The number of tokens in the prompt of a response."""
        fields = await bodies.read(request, COUNT_FIELDS)
        context_of(request.scope).names = NAMES
        prompt = read_response(fields, registry.model).prompt
        answer = await service.encode(prompt)
        body = {"object": "response.input_tokens", "input_tokens": len(answer["ids"])}
        return JSONResponse(body)

    _add_stored_routes(app)


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
    names = ("type", "name", "description", "parameters", "strict")
    return {name: tool.get(name) for name in names}
