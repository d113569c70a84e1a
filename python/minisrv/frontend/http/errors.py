"""Turns every failure into an error response, in the form of the API that the route belongs to."""

from __future__ import annotations

import asyncio
import json
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from minisrv.errors import InvalidRequestError, MinisrvError, NotReadyError
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.paths import methods_of, similar_path

RETRY_AFTER_S = 1
RETRY_HEADER = "X-Should-Retry"
# The same request would fail again, or was ended on purpose.
_FINAL_CODES = frozenset({"internal_error", "request_aborted", "request_ended_engine"})

logger = logging.getLogger("minisrv.frontend")


class ErrorResponse(Response):
    """One failure; a 503 says when to retry."""

    def __init__(self, error: MinisrvError, headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if error.http_status == NotReadyError.http_status:
            headers["Retry-After"] = str(error.retry_after_s or RETRY_AFTER_S)
        if error.code in _FINAL_CODES:  # clients retry a 500 otherwise
            headers[RETRY_HEADER] = "false"
        super().__init__(b"", error.http_status, headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body in the form of the request's route."""
        # ASCII only: a message may quote what the client sent.
        self.body = json.dumps(context_of(scope).error_body(self._error)).encode()
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


class BugMiddleware:
    """A bug is a 500 if no response has begun. Lies within everything that adds headers.

    A request that the server gives up at its end, such as one whose body never came, is a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if context_of(scope).status is not None:
                id = context_of(scope).request_id
                return logger.warning("gave up a reply that its client did not read id=%s", id)
            error = NotReadyError("the server is stopping", code="server_draining")
            await ErrorResponse(error)(scope, receive, send)
        except Exception:
            if scope["type"] != "http":
                raise
            context = context_of(scope)
            logger.exception("request failed id=%s", context.request_id)
            if context.status is None:
                await ErrorResponse(context.internal_error())(scope, receive, send)


def add_error_handlers(app: FastAPI) -> None:
    """Answer our exceptions, the router's 404 and 405, and the framework's 422."""

    @app.exception_handler(MinisrvError)
    async def handle_our_error(request: Request, error: MinisrvError) -> Response:
        return ErrorResponse(error)

    @app.exception_handler(HTTPException)
    async def handle_routing_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        route = f"{request.method} {path}"
        headers = dict(error.headers or {})
        sentence = str(error.detail)
        if error.status_code == 404:
            similar = similar_path(app, request.method, path)
            hint = f"did you mean {similar}?" if similar else "see /docs for the available routes"
            sentence = f"there is no route {route}; {hint}"
        elif error.status_code == 405:
            headers["Allow"] = ", ".join(methods_of(app, path))
            sentence = f"{route} is not allowed; allowed: {headers['Allow']}"
        return ErrorResponse(InvalidRequestError(sentence, status=error.status_code), headers)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"][1:])
        return ErrorResponse(InvalidRequestError(f"{path}: {first['msg']}", param=path))
