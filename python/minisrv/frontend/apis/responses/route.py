"""POST /v1/responses, and the number of tokens of a request to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.frontend.apis.responses.fields import RESPONSE_FIELDS
from minisrv.frontend.apis.responses.history import History, encode_input, read_history
from minisrv.frontend.apis.responses.left_out import LeftOut
from minisrv.frontend.apis.responses.reading import NAMES, read_response
from minisrv.frontend.apis.responses.render import Keep, ResponseRenderer
from minisrv.frontend.apis.responses.store import ResponseStore, StoredResponse
from minisrv.frontend.apis.responses.stored_routes import add_stored_routes
from minisrv.frontend.apis.responses.tools import Tools
from minisrv.frontend.apis.service import Service
from minisrv.frontend.fields.table import Field
from minisrv.frontend.generation.request import ChatRequest
from minisrv.frontend.http.access import key_number_of
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import errors, request_body
from minisrv.frontend.http.sse import json_bytes

Fields = Mapping[str, Any]

RESPONSE_PREFIX = "resp_"
_COUNT_NAMES = (
    *("input", "instructions", "model", "tools", "tool_choice", "parallel_tool_calls", "text"),
    *("reasoning", "enable_thinking", "chat_template_kwargs", "previous_response_id"),
    *("conversation", "truncation"),
)
_EXAMPLE = {"input": "What is 17 + 25?"}
COUNT_FIELDS: dict[str, Field] = {name: RESPONSE_FIELDS[name] for name in _COUNT_NAMES}


def add_response_routes(app: FastAPI, service: Service) -> None:
    """Add answering, counting, and the routes over stored responses."""
    registry, bodies = service.registry, service.bodies
    store = ResponseStore(service.config.response_store_bytes)
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    async def read(request: Request, fields: Fields) -> tuple[ChatRequest, Tools, History]:
        """The request to answer, its tools, and what it continues."""
        context = context_of(request.scope)
        context.names = NAMES
        history = await read_history(fields, store, key_number_of(request.scope), _give_way)
        tools = Tools(fields, history, LeftOut(strict=service.config.strict_params))
        context.names = tools.names_in(NAMES)
        chat = await read_response(fields, history, tools, registry.model, _give_way)
        return chat, tools, history

    @app.post(
        "/v1/responses",
        openapi_extra=request_body(RESPONSE_FIELDS, {**_EXAMPLE, "max_output_tokens": 50}),
        responses=statuses,
    )
    async def create_response(request: Request) -> Response:
        """Answer a conversation, in the shape of the Responses API."""
        fields = await bodies.read_generation(request, RESPONSE_FIELDS)
        chat, tools, history = await read(request, fields)
        id = RESPONSE_PREFIX + context_of(request.scope).request_id
        keep = None
        if stores := store.is_on and fields.get("store", True):
            encoded = await encode_input(fields["input"], _give_way)
            keep = _keep_in(store, id, key_number_of(request.scope), encoded, history)
        echoed = {**_echo(fields, chat), "store": stores}
        renderer = ResponseRenderer(id, chat.model, echoed, tools.callee, keep)
        return service.runner.response(chat, renderer)

    @app.post(
        "/v1/responses/input_tokens",
        openapi_extra=request_body(COUNT_FIELDS, _EXAMPLE),
        responses=statuses,
    )
    async def count_input_tokens(request: Request) -> Response:
        """The number of tokens in the prompt of a response."""
        fields = await bodies.read(request, COUNT_FIELDS)
        chat, _, _ = await read(request, fields)
        num_tokens = await service.count(request, chat.prompt)
        context_of(request.scope).warnings += chat.warnings
        return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    add_stored_routes(app, store, _give_way)


def _keep_in(
    store: ResponseStore, id: str, owner: int, encoded: tuple[bytes, ...], history: History
) -> Keep:
    """What stores a response when it has ended. encoded: the items of its input."""
    previous, referred = history.previous, history.referred  # and not the items that were read

    def keep(body: dict[str, Any]) -> None:
        store.add(
            StoredResponse(
                id=id,
                owner=owner,
                body=json_bytes(body),
                input=encoded,
                output_ids=tuple(item["id"] for item in body["output"]),
                previous=previous,
                referred=referred,
            )
        )

    return keep


async def _give_way() -> None:
    await asyncio.sleep(0)


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
        "previous_response_id": fields.get("previous_response_id"),
        "reasoning": {"effort": fields.get("reasoning", {}).get("effort"), "summary": None},
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
