"""Routes over the tokenizer and the chat template of the model, without generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.chat import read_chat_prompt
from minisrv.frontend.apis.openai.fields import CHAT_FIELDS, chat_fields
from minisrv.frontend.apis.service import Service
from minisrv.frontend.fields.schema import BOOLEAN, INTEGERS, STRING
from minisrv.frontend.fields.table import Field, supported
from minisrv.frontend.generation.request import ChatPrompt, read_token_ids, served_name
from minisrv.frontend.http.openapi import EXAMPLE_MESSAGES, errors, request_body
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.wire.messages import DecodeMsg, DescribeMsg

_CHAT_NAMES = (
    *("model", "messages", "chat_template_kwargs", "tools", "tool_choice"),
    *("reasoning_effort", "enable_thinking", "add_generation_prompt", "continue_final_message"),
    "chat_template",
)

DETOKENIZE_FIELDS: dict[str, Field] = {
    "model": CHAT_FIELDS["model"],
    "tokens": supported(INTEGERS, "Token ids."),
    "skip_special_tokens": supported(BOOLEAN, "Leave special tokens out. Default: false."),
}


def add_token_routes(app: FastAPI, service: Service) -> None:
    """Add text to tokens and back, the rendered prompt of a conversation, and the tokenizer."""
    registry, bodies = service.registry, service.bodies
    table = chat_fields(trust_template=service.config.trust_request_chat_template)
    template_fields = {name: table[name] for name in _CHAT_NAMES}
    tokenize_fields = {
        "prompt": supported(STRING, "Text; or send messages."),
        **template_fields,
        "add_special_tokens": supported(BOOLEAN, "Default: true for a prompt, false for messages."),
    }
    statuses = errors(400, 401, 404, 408, 413, 415, 503)

    @app.post(
        "/tokenize",
        openapi_extra=request_body(tokenize_fields, {"prompt": "Hello"}),
        responses=statuses,
    )
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of a conversation."""
        fields = await bodies.read(request, tokenize_fields)
        served_name(fields.get("model"), registry.model)
        special = fields.get("add_special_tokens", "prompt" in fields)
        answer = await service.encode(
            request, _read_prompt(fields, registry.model), add_special_tokens=special
        )
        return _json_response(
            count=b"%d" % answer["count"],
            max_model_len=b"%d" % registry.model.max_model_len,
            tokens=answer["ids"],
            token_strs=answer["tokens"],
        )

    @app.post("/apply-template", include_in_schema=False)
    @app.post(
        "/apply_template",
        openapi_extra=request_body(template_fields, {"messages": EXAMPLE_MESSAGES}),
        responses=statuses,
    )
    async def apply_template(request: Request) -> Response:
        """The prompt that the model would see, and its tokens."""
        fields = await bodies.read(request, template_fields)
        served_name(fields.get("model"), registry.model)
        answer = await service.encode(request, read_chat_prompt(fields, registry.model))
        return _json_response(
            prompt=answer["text"], tokens=answer["ids"], count=b"%d" % answer["count"]
        )

    _add_detokenize_route(app, service, statuses)

    @app.get("/tokenizer_info", responses=errors(401, 503))
    async def tokenizer_info(request: Request) -> Response:
        """Special tokens, chat template and size of the vocabulary."""
        answer = await service.ask(request, lambda query: DescribeMsg(query=query))
        return JSONResponse({**answer, "max_model_len": registry.model.max_model_len})


def _add_detokenize_route(
    app: FastAPI, service: Service, statuses: dict[int | str, dict[str, Any]]
) -> None:
    registry, bodies = service.registry, service.bodies

    @app.post(
        "/detokenize",
        openapi_extra=request_body(DETOKENIZE_FIELDS, {"tokens": [40, 41]}),
        responses=statuses,
    )
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        fields = await bodies.read(request, DETOKENIZE_FIELDS)
        served_name(fields.get("model"), registry.model)
        if "tokens" not in fields:
            raise InvalidRequestError("tokens is missing", param="tokens")
        ids = np.empty(0, np.int32)
        if fields["tokens"]:
            ids = read_token_ids(fields["tokens"], registry.model, "tokens")
        skip = fields.get("skip_special_tokens", False)
        answer = await service.ask(
            request, lambda query: DecodeMsg(query=query, token_ids=ids, skip_special_tokens=skip)
        )
        return _json_response(prompt=answer["text"], text=answer["text"])


def _json_response(**members: bytes) -> Response:
    """An object whose values are JSON texts. They may be long, so they are only joined here."""
    body = b",".join(b'"%b":%b' % (name.encode(), value) for name, value in members.items())
    return Response(b"{%b}" % body, media_type="application/json")


def _read_prompt(fields: Mapping[str, Any], model: ModelInfo) -> str | ChatPrompt:
    if "messages" not in fields:
        if "prompt" not in fields:
            raise InvalidRequestError("send prompt or messages", param="prompt")
        prompt: str = fields["prompt"]
        return prompt
    if "prompt" in fields:
        raise InvalidRequestError("send messages or prompt, not both", param="messages")
    return read_chat_prompt(fields, model)
