"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, without any state."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.frontend.apis.anthropic.errors import ERROR_SCHEMA, PATH
from minisrv.frontend.apis.anthropic.fields import COUNT_FIELDS, MESSAGES_FIELDS
from minisrv.frontend.apis.anthropic.reading import (
    read_message_request,
    read_prompt,
    warnings,
)
from minisrv.frontend.apis.anthropic.reply import MessagesResponse
from minisrv.frontend.apis.openai.render import ReplyHeader
from minisrv.frontend.fields.read_body import BodyFields, with_warnings
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import errors, request_body
from minisrv.frontend.ops.metrics import ServerMetrics
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import EncodeMsg


def add_messages_routes(
    app: FastAPI, body_fields: BodyFields, registry: RequestRegistry, metrics: ServerMetrics
) -> None:
    """The two routes."""
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503, schema=ERROR_SCHEMA)

    @app.post(PATH, openapi_extra=request_body(MESSAGES_FIELDS), responses=statuses)
    async def create_message(request: Request) -> Response:
        """Answer a conversation, in Anthropic's form."""
        model = registry.model
        fields, headers = await body_fields.read_generation(request, MESSAGES_FIELDS)
        context = context_of(request.scope)
        generation = read_message_request(fields, model)
        header = ReplyHeader(
            id=f"msg_{context.request_id}",
            chat=True,
            created=int(time.time()),
            model=model.name_for(fields),
            system_fingerprint="",
            choices_per_prompt=1,
            calls=generation.calls,
        )
        headers = with_warnings(headers, warnings(fields))
        response = MessagesResponse(registry, generation, header, context, headers, metrics)
        response.show_reasoning = fields.get("thinking", {}).get("display") != "omitted"
        return response

    @app.post(f"{PATH}/count_tokens", openapi_extra=request_body(COUNT_FIELDS), responses=statuses)
    async def count_message_tokens(request: Request) -> Response:
        """The tokens of the prompt, as the template writes it."""
        fields, headers = await body_fields.read(request, COUNT_FIELDS)
        generation = read_prompt(fields, registry.model)
        answer = await registry.ask(
            lambda query: EncodeMsg(
                query=query,
                messages=generation.messages,
                template_kwargs=generation.template_kwargs,
                tools=generation.tools,
                add_special_tokens=False,
                add_generation_prompt=generation.add_generation_prompt,
                continue_final_message=generation.continue_final_message,
            )
        )
        return JSONResponse({"input_tokens": len(answer["ids"])}, headers=headers)
