"""What is known of an HTTP request besides its body.

RequestContextMiddleware surrounds the whole application: every response gets a request id, every
request a line in the log. It is pure ASGI, because a middleware that re-creates `receive` would
hide that a client has disconnected.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisrv import log
from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.fields.names import NEUTRAL_NAMES, FieldNames, merge_aliases
from minisrv.frontend.http.error_format import ErrorFormat

logger = logging.getLogger("minisrv.frontend")

CLIENT_GONE = 499
REQUEST_ID_HEADER = "X-Request-Id"
WARNINGS_HEADER = "X-Minisrv-Warnings"
_SCOPE_KEY = "minisrv.request"
# Of agents: opencode, Codex and Claude Code.
SESSION_HEADERS = ("x-session-id", "session-id", "x-claude-code-session-id")
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
PROBE_PATHS = frozenset({"/health", "/healthz", "/ping", "/v1/health", "/ready"})
_QUIET_PATHS = PROBE_PATHS | {"/metrics"}


@dataclass(slots=True)
class RequestContext:
    """error_format: of the route's API. names: what the API calls the fields of the request.

    send_to_client: the server's `send`, past all middlewares. They only add headers, so messages
    after the first one may take it. warnings: sentences for a header of a successful response.
    log_values: end the line of the request in the log.
    """

    request_id: str
    error_format: ErrorFormat
    send_to_client: Send
    names: FieldNames = NEUTRAL_NAMES
    arrived_at: float = field(default_factory=time.monotonic)
    status: int | None = None
    warnings: list[str] = field(default_factory=list)
    log_values: dict[str, Any] = field(default_factory=dict)

    def take_id(self, body: Any) -> None:
        """Use the id in a body, if there is one; other types are left to the check of the field.

        Raises InvalidRequestError.
        """
        given = body if isinstance(body, dict) else {}
        ids = {n: given[n] for n in ("request_id", "rid") if isinstance(given.get(n), str)}
        for name, request_id in ids.items():
            if not _SANE_ID.fullmatch(request_id):
                raise InvalidRequestError(
                    f"{name} must be 1 to 128 of the characters A-Z a-z 0-9 . _ : / + = @ -",
                    param=name,
                )
        self.request_id = merge_aliases(ids).get("request_id", self.request_id)

    def error_body(self, error: MinisrvError) -> dict[str, Any]:
        """The body of an error response; `error` gets the API's own name of its field."""
        self.names.name_field_of(error)
        return self.error_format.body(error, self.request_id)

    def internal_error(self) -> MinisrvError:
        """What a client may know about a bug."""
        return MinisrvError(f"internal error; see the log under request id {self.request_id}")


def context_of(scope: Scope) -> RequestContext:
    """The context of the request that `scope` belongs to."""
    context = scope[_SCOPE_KEY]
    assert isinstance(context, RequestContext)
    return context


class RequestContextMiddleware:
    """Gives each request its context, with the error format that its path begins with."""

    def __init__(
        self,
        app: ASGIApp,
        error_formats: Mapping[str, ErrorFormat],
        count_response: Callable[[str, str, int, float], None],
    ) -> None:
        """error_formats: by path prefix. count_response: called with route, method, status, s."""
        self._app = app
        self._error_formats = error_formats
        self._count_response = count_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given_id = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given_id if _SANE_ID.fullmatch(given_id) else uuid.uuid4().hex
        context = RequestContext(request_id, self._error_format(scope["path"]), send)
        scope[_SCOPE_KEY] = context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in (REQUEST_ID_HEADER, context.error_format.id_header):
                    if name is not None:
                        headers[name] = context.request_id
                if context.warnings and message["status"] == 200:
                    headers[WARNINGS_HEADER] = "; ".join(context.warnings)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            context.status = CLIENT_GONE
        finally:
            self._finish(scope, context)

    def _error_format(self, path: str) -> ErrorFormat:
        for prefix, error_format in self._error_formats.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                return error_format
        return ErrorFormat()

    def _finish(self, scope: Scope, context: RequestContext) -> None:
        """Log and count a request that has ended."""
        seconds = time.monotonic() - context.arrived_at
        values = {
            "status": context.status,
            "ms": round(seconds * 1000),
            "id": context.request_id,
            **({} if (session := session_of(scope)) is None else {"session": session}),
            **context.log_values,
        }
        level = logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO
        log.event(logger, level, f"{scope['method']} {ascii(scope['path'])[1:-1]}", values)
        route = getattr(scope.get("route"), "path", "other")
        self._count_response(route, scope["method"], context.status or CLIENT_GONE, seconds)


def session_of(scope: Scope) -> str | None:
    """The session that a client names for its requests, if it does."""
    headers = Headers(scope=scope)
    ids = (headers.get(name, "") for name in SESSION_HEADERS)
    return next((id for id in ids if _SANE_ID.fullmatch(id)), None)
