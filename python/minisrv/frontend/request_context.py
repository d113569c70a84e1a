"""Wraps the app: a request id in and out, one log line a request, no exception to the server.

Pure ASGI: a middleware that re-creates `receive` would hide that a client has gone.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisrv.errors import MinisrvError
from minisrv.frontend.http_errors import error_response

logger = logging.getLogger("minisrv.frontend")

REQUEST_ID_HEADER = "X-Request-Id"
CLIENT_GONE = 499
_SCOPE_KEY = "minisrv.request"
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


@dataclass(slots=True)
class RequestContext:
    """What is known of a request besides its body; `figures` end its line in the log."""

    request_id: str
    status: int | None = None
    figures: str = ""

    def internal_error(self) -> MinisrvError:
        """What a client may know of a bug."""
        return MinisrvError(f"internal error; the log has it under request id {self.request_id}")


def context_of(scope: Scope) -> RequestContext:
    """The context of the request that `scope` belongs to."""
    context = scope[_SCOPE_KEY]
    assert isinstance(context, RequestContext)
    return context


class RequestContextMiddleware:
    """Gives each request its context."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its id in the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = scope[_SCOPE_KEY] = RequestContext(_read_id(Headers(scope=scope)))
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = context.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            context.status = CLIENT_GONE
        except Exception:
            logger.exception("request failed id=%s", context.request_id)
            if context.status is None:
                await error_response(context.internal_error())(scope, receive, send_with_id)
        finally:
            _log(scope, context, time.monotonic() - began)


def _read_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, context: RequestContext, seconds: float) -> None:
    quiet = scope["path"] in _QUIET_PATHS
    logger.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s status=%s ms=%.0f id=%s %s",
        scope["method"],
        ascii(scope["path"])[1:-1],
        context.status,
        seconds * 1000,
        context.request_id,
        context.figures,
    )
