"""Routes that show the server's state, and those that change it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.config import ServerConfig
from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.fields.names import merge_aliases
from minisrv.frontend.fields.schema import BOOLEAN, STRING, between
from minisrv.frontend.fields.table import Field, supported
from minisrv.frontend.http.access import require_admin
from minisrv.frontend.http.body import BodyReader
from minisrv.frontend.http.openapi import errors, request_body
from minisrv.frontend.http.paths import add_head_routes
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import FlushMsg

ABORT_FIELDS: dict[str, Field] = {
    "rid": supported(STRING, "The id of a request: its X-Request-Id, or the id of its reply."),
    "request_id": supported(STRING, "The same as rid."),
    "abort_all": supported(BOOLEAN, "Abort all open requests."),
}
FLUSH_FIELDS: dict[str, Field] = {
    "timeout": supported(
        between(0, 600), "Seconds to wait for open requests to end, up to 600. Default: 0."
    )
}
_RETRY_S = 0.05


def add_load_route(app: FastAPI, registry: RequestRegistry) -> None:
    """Add /v1/loads, for every key."""

    @app.get("/v1/loads", responses=errors(401, 503))
    async def loads() -> dict[str, Any]:
        """How busy the server is."""
        _ = registry.model  # raises while there is none
        return {"loads": [load_of(registry)]}


def add_admin_routes(
    app: FastAPI,
    config: ServerConfig,
    version: str,
    bodies: BodyReader,
    registry: RequestRegistry,
    reply_prefixes: Sequence[str],
) -> None:
    """Add the routes for administrators.

    reply_prefixes: what reply ids have in front of the request id.
    """
    router = APIRouter(dependencies=[Depends(require_admin)])
    of_a_body = (400, 401, 403, 408, 413, 415)

    @router.get("/get_server_info", include_in_schema=False)
    @router.get("/server_info", responses=errors(401, 403, 503))
    async def server_info() -> dict[str, Any]:
        """Options, model, state, and the duration of each phase of the start."""
        model = registry.model
        phases = pairwise(registry.phases.items())
        return {
            "version": version,
            "model": model.name,
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
            **{name: value for name, value in model.facts.items() if name != "max_seq_len"},
            "start_seconds": {name: round(end - began, 3) for (name, began), (_, end) in phases},
            "load": load_of(registry),
            "config": config.to_public_dict(),
        }

    @router.post(
        "/flush_cache",
        openapi_extra=request_body(FLUSH_FIELDS, {"timeout": 5}, required=False),
        responses=errors(*of_a_body, 503),
    )
    async def flush_cache(request: Request) -> Response:
        """Empty the prefix cache; 400 while requests are open."""
        fields = await bodies.read(request, FLUSH_FIELDS, required=False)
        num_pages = await _flush(registry, fields.get("timeout", 0))
        return JSONResponse({"success": True, "flushed_pages": num_pages})

    @router.post("/abort", include_in_schema=False)
    @router.post(
        "/abort_request",
        openapi_extra=request_body(ABORT_FIELDS, {"abort_all": True}),
        responses=errors(*of_a_body, 404),
    )
    async def abort_request(request: Request) -> Response:
        """End one request, or all; their clients get an error."""
        fields = await bodies.read(request, ABORT_FIELDS)
        return JSONResponse({"aborted": _abort(registry, fields, reply_prefixes)})

    add_head_routes(router)
    app.include_router(router)


def add_drain_route(app: FastAPI, start_drain: Callable[[], None]) -> None:
    """Add /drain, for administrators."""

    @app.post(
        "/drain",
        status_code=202,
        dependencies=[Depends(require_admin)],
        responses=errors(401, 403),
    )
    async def drain() -> Response:
        """Refuse new requests, let those that are open end, and stop the server."""
        start_drain()
        return JSONResponse({"status": "draining"}, 202)


def _abort(registry: RequestRegistry, fields: dict[str, Any], reply_prefixes: Sequence[str]) -> int:
    """The number of requests aborted. Raises InvalidRequestError if there were none."""
    id = merge_aliases(fields).get("request_id")
    if bool(id) == fields.get("abort_all", False):
        raise InvalidRequestError("send either rid or abort_all: true", param="rid")
    error = MinisrvError("the request was aborted by the server", code="request_aborted")
    ids = [id, *(id.removeprefix(p) for p in reply_prefixes if id.startswith(p))] if id else [None]
    for candidate in ids:
        if num_aborted := registry.cancel(candidate, error):
            return num_aborted
    sentence = "no open request has this id" if id else "there are no open requests"
    raise InvalidRequestError(sentence, status=404)


async def _flush(registry: RequestRegistry, timeout_s: float) -> int:
    """The number of pages dropped. Raises InvalidRequestError if requests stay open that long."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            # Always through tokenizer 0, behind the requests that went the same way.
            answer = await registry.ask(lambda query: FlushMsg(query=query), tokenizer_index=0)
            return int(answer["pages"])
        except MinisrvError as error:
            refused = error.http_status == InvalidRequestError.http_status
            if not refused or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(_RETRY_S)


def load_of(registry: RequestRegistry) -> dict[str, Any]:
    """The last statistics of the scheduler, at most one period old while it lives."""
    load: dict[str, Any] = {"dp_rank": 0, "num_open_reqs": registry.num_open}
    if (stats := registry.stats) is not None:
        load |= {
            "num_running_reqs": stats.running,
            "num_waiting_reqs": stats.waiting,
            "num_used_tokens": stats.pages_used * stats.page_size,
            "max_total_num_tokens": stats.num_pages * stats.page_size,
            "num_pages": stats.num_pages,
            "num_free_pages": stats.num_pages - stats.pages_used,
            "page_size": stats.page_size,
            "token_usage": stats.pages_used / stats.num_pages,
            "num_queued_tokens": stats.queued_tokens,
            "prefill_tokens_per_s": stats.prefill_rate,
            "decode_tokens_per_s": stats.decode_rate,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "output_tokens": stats.output_tokens,
        }
    return load
