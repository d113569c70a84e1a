"""The HTTP application: its routes and what stands around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi_offline import FastAPIOffline
from starlette.responses import JSONResponse, Response

from minisrv.config import ServerConfig
from minisrv.frontend.apis.anthropic.route import add_messages_routes
from minisrv.frontend.apis.native import add_native_route
from minisrv.frontend.apis.openai.chat import read_chat
from minisrv.frontend.apis.openai.completions import read_completion
from minisrv.frontend.apis.openai.render import ReplyHeader
from minisrv.frontend.apis.responses.route import add_response_routes
from minisrv.frontend.apis.tokens import add_token_routes
from minisrv.frontend.fields.read_body import BodyFields, with_warnings
from minisrv.frontend.fields.table import (
    COMPLETION_FIELDS,
    Field,
    chat_fields,
)
from minisrv.frontend.fields.unknown import UnknownFields
from minisrv.frontend.generation.fingerprint import fingerprint
from minisrv.frontend.generation.request import Generation, model_not_found
from minisrv.frontend.generation.run import GenerationResponse
from minisrv.frontend.http.access import METRICS_PATH, PUBLIC_PATHS, AccessMiddleware, Keys
from minisrv.frontend.http.context import (
    BugMiddleware,
    RequestContextMiddleware,
    context_of,
)
from minisrv.frontend.http.cors import PagesMiddleware
from minisrv.frontend.http.errors import RETRY_AFTER_S, add_error_handlers, error_body
from minisrv.frontend.http.openapi import describe_errors, errors, request_body
from minisrv.frontend.ops.admin import add_admin_routes
from minisrv.frontend.ops.metrics import CONTENT_TYPE, ServerMetrics
from minisrv.frontend.ops.root_page import add_root_page
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.frontend.registry.server_state import Dead, Ready, Starting

VERSION = version("minisrv")

Reader = Callable[[dict[str, Any], ModelInfo], Generation]


def create_app(
    config: ServerConfig, registry: RequestRegistry, *, host_is_ours: bool = True
) -> FastAPI:
    """The application over `registry`. It answers from the first moment: /ready tells the state.

    host_is_ours: false for an application that somebody else's server listens for.
    Raises ConfigError for keys that cannot be used.
    """
    keys = Keys.of(config, host_is_ours=host_is_ours)
    app = FastAPIOffline(
        title="minisrv",
        version=VERSION,
        description="An LLM server with an OpenAI-compatible API.",
        redirect_slashes=False,
    )
    public_paths = PUBLIC_PATHS | ({METRICS_PATH} if config.public_metrics else frozenset())
    describe_errors(app, frozenset(path.decode() for path in public_paths))
    unknown_fields = app.state.unknown_fields = UnknownFields(strict=config.strict_params)
    metrics = ServerMetrics(
        config.served_name,
        lambda: registry.stats,
        unknown_fields.counts.total,
        vllm_names=config.metrics_vllm_names,
    )
    add_error_handlers(app)
    add_root_page(app, VERSION, config.served_name)
    _add_state_routes(app, registry, metrics)
    _add_model_routes(app, registry)
    body_fields = BodyFields(config.max_body_bytes, unknown_fields, metrics.count_ignored_field)
    chat_table = chat_fields(trust_template=config.trust_request_chat_template)
    _add_generation_routes(app, config, body_fields, registry, metrics, chat_table)
    add_native_route(app, config.max_open_requests, body_fields, registry, metrics)
    add_messages_routes(app, body_fields, registry, metrics)
    add_response_routes(app, config.max_open_requests, body_fields, registry, metrics)
    add_token_routes(app, body_fields, registry, chat_table)
    add_admin_routes(app, config, VERSION, body_fields, registry)
    app.add_middleware(AccessMiddleware, keys=keys, public_paths=public_paths)
    app.add_middleware(BugMiddleware)
    if config.cors_origins:
        app.add_middleware(PagesMiddleware, origins=config.cors_origins)
    app.add_middleware(RequestContextMiddleware, metrics=metrics)
    return app


def _add_state_routes(app: FastAPI, registry: RequestRegistry, metrics: ServerMetrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=errors(503))
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

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """The server's figures, in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_model_routes(app: FastAPI, registry: RequestRegistry) -> None:
    @app.get("/v1/models", responses=errors(503))
    async def list_models() -> dict[str, Any]:
        """The served model, under each of its names."""
        model = registry.model
        return {"object": "list", "data": [_model_body(model, name) for name in model.names]}

    @app.get("/v1/models/{model_id:path}", responses=errors(404, 503))
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        """The served model, by name."""
        if model_id not in registry.model.names:
            raise model_not_found(model_id, registry.model)
        return _model_body(registry.model, model_id)


def _add_generation_routes(
    app: FastAPI,
    config: ServerConfig,
    body_fields: BodyFields,
    registry: RequestRegistry,
    metrics: ServerMetrics,
    chat_table: Mapping[str, Field],
) -> None:

    system_fingerprint = fingerprint(config)

    async def generate(
        request: Request, table: Mapping[str, Field], read: Reader, chat: bool
    ) -> Response:
        model = registry.model
        fields, headers = await body_fields.read_generation(request, table)
        context = context_of(request.scope)
        generation = read(fields, model)
        generation.check_fits(config.max_open_requests)
        header = ReplyHeader(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{context.request_id}",
            chat=chat,
            created=int(time.time()),
            model=model.name_for(fields),
            system_fingerprint=system_fingerprint,
            choices_per_prompt=generation.sampling.n,
            calls=generation.calls,
            reasoning_fields=config.reasoning_fields,
            echoed=generation.echoed,
            returned=generation.returned,
        )
        headers = with_warnings(headers, generation.warnings)
        timings = fields.get("timings", False)
        return GenerationResponse(
            registry, generation, header, context, headers, metrics, timings=timings
        )

    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post("/v1/chat/completions", openapi_extra=request_body(chat_table), responses=statuses)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        return await generate(request, chat_table, read_chat, chat=True)

    @app.post("/v1/completions", openapi_extra=request_body(COMPLETION_FIELDS), responses=statuses)
    async def create_completion(request: Request) -> Response:
        """Continue one or more prompts."""
        return await generate(request, COMPLETION_FIELDS, read_completion, chat=False)


def _model_body(model: ModelInfo, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "minisrv",
        "max_model_len": model.max_model_len,
    }
