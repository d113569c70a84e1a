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
from minisrv.frontend.fields.aliases import merge_aliases
from minisrv.frontend.fields.names import NEUTRAL_NAMES, FieldNames
from minisrv.frontend.http.error_format import DefaultErrorFormat, ErrorFormat
from minisrv.frontend.http.headers import REQUEST_ID_HEADER

logger = logging.getLogger("minisrv.frontend")

CLIENT_GONE = 499
_SCOPE_KEY = "minisrv.request"
_ID_NAMES = ("request_id", "rid")
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
_DEFAULT_FORMAT = DefaultErrorFormat()

CountResponse = Callable[[str, str, int, float], None]


@dataclass(slots=True)
class RequestContext:
    """error_format: of the route's API. names: what the API calls the fields of the request.

    body_send: sends messages after the first one, past what only adds headers.
    log_values: end the line of the request in the log.
    """

    request_id: str
    error_format: ErrorFormat = _DEFAULT_FORMAT
    names: FieldNames = NEUTRAL_NAMES
    body_send: Send | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    status: int | None = None
    log_values: dict[str, Any] = field(default_factory=dict)

    def take_id(self, body: Any) -> None:
        """Use the id in a body, if there is one; other types are left to the check of the field.

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
        count_response: CountResponse,
    ) -> None:
        """error_formats: by path prefix. count_response: called with route, method, status, s."""
        self._app = app
        self._error_formats = error_formats
        self._count_response = count_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its id in the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(
            _read_id(Headers(scope=scope)), self._error_format(scope["path"]), body_send=send
        )
        scope[_SCOPE_KEY] = context

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = context.request_id
                if context.error_format.id_header is not None:
                    headers[context.error_format.id_header] = context.request_id
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
            self._count_response(route, scope["method"], status, seconds)

    def _error_format(self, path: str) -> ErrorFormat:
        for prefix, error_format in self._error_formats.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                return error_format
        return _DEFAULT_FORMAT


def _read_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def _log(scope: Scope, context: RequestContext, seconds: float) -> None:
    quiet = scope["path"] in _QUIET_PATHS
    values = {
        "status": context.status,
        "ms": round(seconds * 1000),
        "id": context.request_id,
        **context.log_values,
    }
    name = f"{scope['method']} {ascii(scope['path'])[1:-1]}"
    log.event(logger, logging.DEBUG if quiet else logging.INFO, name, values)
