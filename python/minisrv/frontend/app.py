"""The HTTP application: its routes and what stands around them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from minisrv.config import ServerConfig
from minisrv.frontend.chat import read_chat
from minisrv.frontend.completions import read_completion
from minisrv.frontend.generation import Generation, model_not_found
from minisrv.frontend.http_body import read_json
from minisrv.frontend.http_errors import (
    ERROR_SCHEMA,
    RETRY_AFTER_S,
    add_error_handlers,
    error_body,
)
from minisrv.frontend.model_info import ModelInfo
from minisrv.frontend.openai_types import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    Field,
    read_fields,
    request_schema,
)
from minisrv.frontend.request_context import (
    REQUEST_ID_HEADER,
    RequestContextMiddleware,
    context_of,
)
from minisrv.frontend.request_registry import Dead, Ready, RequestRegistry, Starting
from minisrv.frontend.responder import GenerationResponse
from minisrv.frontend.stream import ReplyHeader
from minisrv.frontend.unknown_fields import UnknownFields

WARNINGS_HEADER = "X-Minisrv-Warnings"
VERSION = version("minisrv")

Reader = Callable[[dict[str, Any], ModelInfo], Generation]


def create_app(config: ServerConfig, registry: RequestRegistry) -> FastAPI:
    """The application over `registry`. It answers from the first moment: /ready tells the state."""
    app = FastAPIOffline(
        title="minisrv",
        version=VERSION,
        description="An LLM server with an OpenAI-compatible API.",
        redirect_slashes=False,
    )
    add_error_handlers(app)
    _add_state_routes(app, registry)
    _add_model_routes(app, registry)
    _add_generation_routes(app, config, registry)
    app.add_middleware(RequestContextMiddleware)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in config.cors_origins.split(",")],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, WARNINGS_HEADER, "Retry-After"],
        )
    return app


def _add_state_routes(app: FastAPI, registry: RequestRegistry) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_errors(503))
    async def health() -> Response:
        """Whether the server is alive: 200 also while the model is loaded, 503 when it is dead."""
        if isinstance(registry.state, Dead):
            return JSONResponse(error_body(registry.state.error), 503)
        return JSONResponse({"status": "ok"})

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"description": "Not ready."}})
    async def ready() -> Response:
        """Whether requests are served: 200, or 503 with how far the start is."""
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        match registry.state:
            case Ready():
                return JSONResponse({"status": "ready"})
            case Starting(phase, fraction):
                body = {"status": "loading", "phase": phase, "progress": round(fraction, 4)}
                return JSONResponse(body, 503, headers)
            case Dead(error):
                return JSONResponse({"status": "dead", **error_body(error)}, 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": VERSION}


def _add_model_routes(app: FastAPI, registry: RequestRegistry) -> None:
    @app.get("/v1/models", responses=_errors(503))
    async def list_models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [_model_body(registry.model)]}

    @app.get("/v1/models/{model_id:path}", responses=_errors(404, 503))
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        """The served model, by name."""
        if model_id != registry.model.name:
            raise model_not_found(model_id, registry.model)
        return _model_body(registry.model)


def _add_generation_routes(app: FastAPI, config: ServerConfig, registry: RequestRegistry) -> None:
    unknown_fields = app.state.unknown_fields = UnknownFields(strict=config.strict_params)
    fingerprint = _fingerprint(config)

    async def generate(
        request: Request, table: Mapping[str, Field], read: Reader, chat: bool
    ) -> Response:
        model = registry.model
        body = await read_json(request, config.max_body_bytes)
        fields, unknown = read_fields(body, table)
        warning = unknown_fields.report(unknown)
        generation = read(fields, model)
        generation.check_fits(config.max_open_requests)
        context = context_of(request.scope)
        header = ReplyHeader(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{context.request_id}",
            chat=chat,
            created=int(time.time()),
            model=model.name,
            system_fingerprint=fingerprint,
            choices_per_prompt=generation.sampling.n,
            calls=generation.calls,
            reasoning_fields=config.reasoning_fields,
        )
        headers = {WARNINGS_HEADER: warning} if warning else {}
        return GenerationResponse(registry, generation, header, context, headers)

    errors = _errors(400, 404, 408, 413, 415, 500, 503)

    @app.post("/v1/chat/completions", openapi_extra=_request_body(CHAT_FIELDS), responses=errors)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        return await generate(request, CHAT_FIELDS, read_chat, chat=True)

    @app.post("/v1/completions", openapi_extra=_request_body(COMPLETION_FIELDS), responses=errors)
    async def create_completion(request: Request) -> Response:
        """Continue one or more prompts."""
        return await generate(request, COMPLETION_FIELDS, read_completion, chat=False)


def _model_body(model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "minisrv",
        "max_model_len": model.max_model_len,
    }


def _fingerprint(config: ServerConfig) -> str:
    """Changes with what may change the text of a request: version, weights and their arithmetic."""
    names = ("model", "dtype", "device", "attention_backend", "load_format", "tp")
    values = json.dumps([getattr(config, name) for name in names])
    return f"minisrv-{VERSION}-{hashlib.sha256(values.encode()).hexdigest()[:8]}"


def _request_body(table: Mapping[str, Field]) -> dict[str, Any]:
    content = {"application/json": {"schema": request_schema(table)}}
    return {"requestBody": {"required": True, "content": content}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": "Error", "content": content} for status in statuses}
