"""Wraps the app: a request id in and out, a log line at the end, no exception to the server.

Pure ASGI: a middleware that re-creates `receive` would hide that a client has gone.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisrv import log
from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.apis.anthropic.errors import speaks_anthropic
from minisrv.frontend.fields.aliases import merge_aliases
from minisrv.frontend.http.errors import CONTEXT_KEY, error_response
from minisrv.frontend.ops.metrics import ServerMetrics

logger = logging.getLogger("minisrv.frontend")

REQUEST_ID_HEADER = "X-Request-Id"
ANTHROPIC_ID_HEADER = "Request-Id"
CLIENT_GONE = 499
_ID_NAMES = ("request_id", "rid")
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


@dataclass(slots=True)
class RequestContext:
    """What is known of a request besides its body; `figures` end its line in the log."""

    request_id: str
    arrived_at: float = field(default_factory=time.monotonic)
    status: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def take_id(self, body: Any) -> None:
        """Take the id that a body names, if any; what is no text is left to the field's check.

        Raises InvalidRequestError.
        """
        given = body if isinstance(body, dict) else {}
        names = {name: given[name] for name in _ID_NAMES if isinstance(given.get(name), str)}
        for name, request_id in names.items():
            if not _SANE_ID.fullmatch(request_id):
                raise InvalidRequestError(
                    f"{name} must be 1 to 128 of the characters A-Z a-z 0-9 . _ : / + = @ -",
                    param=name,
                )
        self.request_id = merge_aliases(names).get("request_id", self.request_id)

    def internal_error(self) -> MinisrvError:
        """What a client may know of a bug."""
        return MinisrvError(f"internal error; the log has it under request id {self.request_id}")


def context_of(scope: Scope) -> RequestContext:
    """The context of the request that `scope` belongs to."""
    context = scope[CONTEXT_KEY]
    assert isinstance(context, RequestContext)
    return context


class RequestContextMiddleware:
    """Gives each request its context. Stands around all else, so every response has an id."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its id in the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = scope[CONTEXT_KEY] = RequestContext(_read_id(Headers(scope=scope)))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = context.request_id
                if speaks_anthropic(scope["path"]):
                    headers[ANTHROPIC_ID_HEADER] = context.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            context.status = CLIENT_GONE
        finally:
            seconds = time.monotonic() - context.arrived_at
            _log(scope, context, seconds)
            route = getattr(scope.get("route"), "path", "other")
            status = context.status or CLIENT_GONE
            self._metrics.count_response(route, scope["method"], status, seconds)


class BugMiddleware:
    """Answers what nothing else has caught, within whatever adds headers to responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a bug is a 500, where no response has begun."""
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            raise
        except Exception:
            if scope["type"] != "http":
                raise
            context = context_of(scope)
            logger.exception("request failed id=%s", context.request_id)
            if context.status is None:
                await error_response(context.internal_error())(scope, receive, send)


def _read_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, context: RequestContext, seconds: float) -> None:
    quiet = scope["path"] in _QUIET_PATHS
    figures = {
        "status": context.status,
        "ms": round(seconds * 1000),
        "id": context.request_id,
        **context.figures,
    }
    name = f"{scope['method']} {ascii(scope['path'])[1:-1]}"
    log.event(logger, logging.DEBUG if quiet else logging.INFO, name, figures)
