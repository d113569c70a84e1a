"""Turns every failure into an error response, in the form of the API that the route belongs to.

The default form is OpenAI's error object. An API with another form registers an ErrorFormat for
its routes, which the request's context carries.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.errors import InvalidRequestError, MinisrvError, NotReadyError
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.headers import RETRY_HEADER

RETRY_AFTER_S = 1
# The same request would fail again, or was ended on purpose.
_FINAL_CODES = frozenset({"internal_error", "request_aborted"})


class ErrorResponse(Response):
    """One failure; a 503 says when to retry."""

    def __init__(self, error: MinisrvError, headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if error.http_status == NotReadyError.http_status:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if error.code in _FINAL_CODES:  # clients retry a 500 otherwise
            headers[RETRY_HEADER] = "false"
        super().__init__(b"", error.http_status, headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the body in the form of the request's route."""
        context = context_of(scope)
        context.names.name_field_of(self._error)
        body = context.error_format.body(self._error, context.request_id)
        # ASCII only: a message may quote what the client sent.
        self.body = json.dumps(body).encode()
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def add_error_handlers(app: FastAPI) -> None:
    """Answer our exceptions, the router's 404 and 405, and the framework's 422."""

    @app.exception_handler(MinisrvError)
    async def handle_our_error(request: Request, error: MinisrvError) -> Response:
        return ErrorResponse(error)

    @app.exception_handler(HTTPException)
    async def handle_routing_error(request: Request, error: HTTPException) -> Response:
        return ErrorResponse(_routing_error(request, error), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"][1:])
        return ErrorResponse(InvalidRequestError(f"{path}: {first['msg']}", param=path))


def _routing_error(request: Request, error: HTTPException) -> MinisrvError:
    route = f"{request.method} {request.url.path}"
    sentences: dict[int, str] = {
        404: f"there is no route {route}; see /docs for the available routes",
        405: f"{route} is not allowed; allowed: {(error.headers or {}).get('Allow', 'nothing')}",
    }
    sentence: Any = sentences.get(error.status_code, error.detail)
    return InvalidRequestError(str(sentence), status=error.status_code)
