"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, without any state."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.frontend.apis.anthropic.errors import ERROR_SCHEMA
from minisrv.frontend.apis.anthropic.fields import COUNT_FIELDS, MESSAGES_FIELDS
from minisrv.frontend.apis.anthropic.reading import NAMES, read_message_request, read_prompt
from minisrv.frontend.apis.anthropic.reply import MessageRenderer
from minisrv.frontend.apis.service import Service
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import errors, request_body

MESSAGES_PATH = "/v1/messages"


def add_message_routes(app: FastAPI, service: Service) -> None:
    registry, bodies = service.registry, service.bodies
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503, schema=ERROR_SCHEMA)

    @app.post(MESSAGES_PATH, openapi_extra=request_body(MESSAGES_FIELDS), responses=statuses)
    async def create_message(request: Request) -> Response:
        """Answer a conversation, in Anthropic's form."""
        model = registry.model
        fields = await bodies.read_generation(request, MESSAGES_FIELDS)
        context = context_of(request.scope)
        context.names = NAMES
        chat = read_message_request(fields, model)
        show_reasoning = fields.get("thinking", {}).get("display") != "omitted"
        renderer = MessageRenderer(context.request_id, chat.model, show_reasoning=show_reasoning)
        return service.runner.response(chat, renderer)

    @app.post(
        f"{MESSAGES_PATH}/count_tokens",
        openapi_extra=request_body(COUNT_FIELDS),
        responses=statuses,
    )
    async def count_message_tokens(request: Request) -> Response:
        """The number of tokens in the prompt, as the template writes it."""
        fields = await bodies.read(request, COUNT_FIELDS)
        context_of(request.scope).names = NAMES
        prompt = read_prompt(fields, registry.model)
        answer = await service.encode(prompt)
        return JSONResponse({"input_tokens": len(answer["ids"])})
