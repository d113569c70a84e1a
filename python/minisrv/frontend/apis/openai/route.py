"""POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from minisrv.frontend.apis.openai.chat import ChatRenderer, chat_names, read_chat
from minisrv.frontend.apis.openai.completions import (
    CompletionRenderer,
    completion_names,
    read_completion,
)
from minisrv.frontend.apis.openai.fields import COMPLETION_FIELDS, chat_fields
from minisrv.frontend.apis.openai.options import read_stream_options
from minisrv.frontend.apis.openai.render import ReplyHead
from minisrv.frontend.apis.service import Service
from minisrv.frontend.generation.fingerprint import fingerprint
from minisrv.frontend.http.body import with_warnings
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import errors, request_body

CHAT_PREFIX, COMPLETION_PREFIX = "chatcmpl-", "cmpl-"


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Add both routes."""
    config, registry, bodies = service.config, service.registry, service.bodies
    chat_table = chat_fields(trust_template=config.trust_request_chat_template)
    system_fingerprint = fingerprint(config)
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post("/v1/chat/completions", openapi_extra=request_body(chat_table), responses=statuses)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        model = registry.model
        fields, headers = await bodies.read_generation(request, chat_table)
        context = context_of(request.scope)
        context.names = chat_names(fields)
        chat = read_chat(fields, model)
        head = ReplyHead(
            id=CHAT_PREFIX + context.request_id,
            model=chat.model,
            system_fingerprint=system_fingerprint,
        )
        options = read_stream_options(fields)
        renderer = ChatRenderer(head, chat, options, config.reasoning_fields)
        return service.runner.response(chat, renderer, with_warnings(headers, chat.warnings))

    @app.post("/v1/completions", openapi_extra=request_body(COMPLETION_FIELDS), responses=statuses)
    async def create_completion(request: Request) -> Response:
        """Continue one or more prompts."""
        model = registry.model
        fields, headers = await bodies.read_generation(request, COMPLETION_FIELDS)
        context = context_of(request.scope)
        context.names = completion_names(fields)
        completion = read_completion(fields, model)
        head = ReplyHead(
            id=COMPLETION_PREFIX + context.request_id,
            model=completion.model,
            system_fingerprint=system_fingerprint,
        )
        renderer = CompletionRenderer(head, completion, read_stream_options(fields))
        return service.runner.response(completion, renderer, headers)
