"""POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from minisrv.frontend.apis.openai.chat import ChatRenderer, read_chat
from minisrv.frontend.apis.openai.completions import CompletionRenderer, read_completion
from minisrv.frontend.apis.openai.fields import COMPLETION_FIELDS, chat_fields, field_names
from minisrv.frontend.apis.service import Service
from minisrv.frontend.generation.fingerprint import fingerprint
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import EXAMPLE_MESSAGES, errors, request_body

_EXAMPLE = {"prompt": "Once upon a time", "max_tokens": 20}


def add_openai_routes(app: FastAPI, service: Service) -> None:
    config, registry, bodies = service.config, service.registry, service.bodies
    chat_table = chat_fields(trust_template=config.trust_request_chat_template)
    system_fingerprint = fingerprint(config)
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post(
        "/v1/chat/completions",
        openapi_extra=request_body(chat_table, {"messages": EXAMPLE_MESSAGES, "max_tokens": 50}),
        responses=statuses,
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        model = registry.model
        fields = await bodies.read_generation(request, chat_table)
        context = context_of(request.scope)
        context.names = field_names(fields)
        chat = read_chat(fields, model)
        options = fields.get("stream_options", {})
        renderer = ChatRenderer(
            context.request_id, system_fingerprint, chat, config.reasoning_fields, options
        )
        return service.runner.response(chat, renderer)

    @app.post(
        "/v1/completions",
        openapi_extra=request_body(COMPLETION_FIELDS, _EXAMPLE),
        responses=statuses,
    )
    async def create_completion(request: Request) -> Response:
        """Continue one or more prompts."""
        model = registry.model
        fields = await bodies.read_generation(request, COMPLETION_FIELDS)
        context = context_of(request.scope)
        context.names = field_names(fields)
        completion = read_completion(fields, model, config.max_open_requests)
        options = fields.get("stream_options", {})
        renderer = CompletionRenderer(context.request_id, system_fingerprint, completion, options)
        return service.runner.response(completion, renderer)
