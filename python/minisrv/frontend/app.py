"""The HTTP application: its routes and the middlewares around them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.frontend.apis.anthropic.errors import AnthropicErrorFormat
from minisrv.frontend.apis.anthropic.route import MESSAGE_PREFIX, MESSAGES_PATH, add_message_routes
from minisrv.frontend.apis.models import add_model_routes
from minisrv.frontend.apis.native import add_native_route
from minisrv.frontend.apis.openai.chat import CHAT_PREFIX
from minisrv.frontend.apis.openai.completions import COMPLETION_PREFIX
from minisrv.frontend.apis.openai.rendered import add_render_routes
from minisrv.frontend.apis.openai.route import add_openai_routes
from minisrv.frontend.apis.responses.route import RESPONSE_PREFIX, add_response_routes
from minisrv.frontend.apis.service import Service
from minisrv.frontend.apis.tokens import add_token_routes
from minisrv.frontend.fields.names import UnknownFields
from minisrv.frontend.generation.run import Runner
from minisrv.frontend.http.access import METRICS_PATH, PUBLIC_PATHS, AccessMiddleware, Keys
from minisrv.frontend.http.body import BodyReader
from minisrv.frontend.http.context import RequestContextMiddleware
from minisrv.frontend.http.cors import PagesMiddleware
from minisrv.frontend.http.error_format import ErrorFormat, error_body
from minisrv.frontend.http.errors import RETRY_AFTER_S, BugMiddleware, add_error_handlers
from minisrv.frontend.http.hosts import AllowedHosts
from minisrv.frontend.http.openapi import describe_access, errors
from minisrv.frontend.http.paths import PrefixMiddleware, add_head_routes
from minisrv.frontend.ops.admin import add_admin_routes, add_drain_route, add_load_route
from minisrv.frontend.ops.cache_tree import add_cache_tree_route
from minisrv.frontend.ops.docs import add_docs
from minisrv.frontend.ops.metrics import CONTENT_TYPE, ServerMetrics
from minisrv.frontend.ops.page import add_page
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.frontend.registry.states import Dead, Draining, Restarting, Serving, Starting
from minisrv.option_values import read_path_prefix

if TYPE_CHECKING:
    from minisrv.frontend.generation.tracing import Tracer

VERSION = version("minisrv")
# By path prefix; errors of all other routes have OpenAI's form.
ERROR_FORMATS: dict[str, ErrorFormat] = {MESSAGES_PATH: AnthropicErrorFormat()}
REPLY_PREFIXES = (CHAT_PREFIX, COMPLETION_PREFIX, RESPONSE_PREFIX, MESSAGE_PREFIX)


def create_app(
    config: ServerConfig,
    registry: RequestRegistry,
    *,
    host_is_ours: bool = True,
    start_drain: Callable[[], None] | None = None,
) -> FastAPI:
    """The application over `registry`. It answers at once: /ready reports the state.

    host_is_ours: False if another program's server listens for the application.
    start_drain: what /drain does; by default it only refuses further requests.
    Raises ConfigError for keys, allowed hosts and a collector of traces that cannot be used.
    """
    keys = Keys.of(config, host_is_ours=host_is_ours)
    hosts = AllowedHosts(config, host_is_ours=host_is_ours)
    app = _new_app()
    root_path = read_path_prefix(config.root_path, "root_path")
    public_paths = PUBLIC_PATHS | add_page(app) | add_docs(app)
    if config.public_metrics:
        public_paths |= {METRICS_PATH}
    describe_access(
        app,
        frozenset(path.decode() for path in public_paths),
        needs_key=keys.always_needed,
        root_path=root_path,
    )
    unknown_fields = app.state.unknown_fields = UnknownFields(strict=config.strict_params)
    metrics = ServerMetrics(
        config.served_name,
        unknown_fields.counts.total,
        registry,
        vllm_names=config.metrics_vllm_names,
    )
    bodies = BodyReader(config.max_body_bytes, unknown_fields, metrics.count_ignored_field)
    app.state.tracer = _open_tracer(config)
    runner = Runner(
        registry,
        config.max_open_requests,
        metrics.count_request,
        fair_keys=config.fair_keys,
        tracer=app.state.tracer,
    )
    service = Service(config, registry, bodies, runner)

    add_error_handlers(app)
    _add_state_routes(app, registry, metrics)
    _add_api_routes(app, service)
    add_admin_routes(app, config, VERSION, bodies, registry, REPLY_PREFIXES)
    add_cache_tree_route(app, registry, REPLY_PREFIXES)
    add_drain_route(app, start_drain or registry.start_drain)
    add_head_routes(app)

    _add_middlewares(app, config, keys, hosts, public_paths, metrics)
    if root_path or config.api_alias:
        aliases = [read_path_prefix(prefix, "api_alias") for prefix in config.api_alias]
        app.add_middleware(PrefixMiddleware, routes=app, root_path=root_path, aliases=aliases)
    return app


def _new_app() -> FastAPI:
    return FastAPI(
        title="minisrv",
        version=VERSION,
        description="An LLM server with an OpenAI-compatible API.",
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )


def close_app(app: FastAPI) -> None:
    """Send the traces that are left."""
    if app.state.tracer is not None:
        app.state.tracer.close()


def _open_tracer(config: ServerConfig) -> Tracer | None:
    if config.otlp_endpoint is None:
        return None
    try:
        from minisrv.frontend.generation.tracing import Tracer
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint needs the packages of the extra otlp: pip install 'minisrv[otlp]' "
            f"({error})"
        ) from error
    return Tracer(config.otlp_endpoint, VERSION)


def _add_api_routes(app: FastAPI, service: Service) -> None:
    add_model_routes(app, service.registry, service.config.served_name)
    add_openai_routes(app, service)
    add_render_routes(app, service)
    add_native_route(app, service)
    add_message_routes(app, service)
    add_response_routes(app, service)
    add_token_routes(app, service)
    add_load_route(app, service.registry)


def _add_middlewares(
    app: FastAPI,
    config: ServerConfig,
    keys: Keys,
    hosts: AllowedHosts,
    public_paths: frozenset[bytes],
    metrics: ServerMetrics,
) -> None:
    # The last one added is the outermost.
    app.add_middleware(
        AccessMiddleware,
        keys=keys,
        hosts=hosts,
        public_paths=public_paths,
    )
    app.add_middleware(BugMiddleware)
    if config.cors_origins:
        id_headers = [form.id_header for form in ERROR_FORMATS.values() if form.id_header]
        app.add_middleware(PagesMiddleware, origins=config.cors_origins, id_headers=id_headers)
    app.add_middleware(
        RequestContextMiddleware,
        error_formats=ERROR_FORMATS,
        count_response=metrics.count_response,
    )


def _add_state_routes(app: FastAPI, registry: RequestRegistry, metrics: ServerMetrics) -> None:
    @app.get("/v1/health", include_in_schema=False)
    @app.get("/ping", include_in_schema=False)
    @app.get("/healthz", include_in_schema=False)
    @app.get("/health", responses=errors(503))
    async def health() -> Response:
        """Whether the server is alive: 200 also while the model loads, 503 when it is dead."""
        if isinstance(registry.state, Dead):
            return JSONResponse(error_body(registry.state.error), 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses={503: {"description": "Not ready."}})
    async def ready() -> Response:
        """Whether requests are served: 200, or 503 with the progress of the start."""
        match registry.state:
            case Serving():
                return JSONResponse({"status": "ready"})
            case Starting(phase, fraction):
                body = {"status": "loading", "phase": phase, "progress": round(fraction, 4)}
                return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})
            case Restarting(_, sentence):
                body = {"status": "restarting", "reason": sentence}
                return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})
            case Draining():
                body = {"status": "draining", "open_requests": registry.num_open}
                return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})
            case Dead(error):
                return JSONResponse({"status": "dead", **error_body(error)}, 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": VERSION}

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)
