"""Every failure leaves as OpenAI's error object, built here and nowhere else.

But for the routes under /v1/messages, which have Anthropic's.
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
from minisrv.frontend.apis.anthropic.errors import messages_error, speaks_anthropic
from minisrv.wire.messages import Failure

RETRY_AFTER_S = 1
RETRY_HEADER = "X-Should-Retry"
# The same request would fail again, or was ended on purpose.
_FINAL_CODES = frozenset({"internal_error", "request_aborted"})
# Where a request's context stands in its scope.
CONTEXT_KEY = "minisrv.request"

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "n_prompt_tokens": {"type": "integer"},
                "n_ctx": {"type": "integer"},
            },
        }
    },
}


def error_body(error: MinisrvError | Failure) -> dict[str, Any]:
    """The OpenAI body: message, type, param and code; llama.cpp's two figures of a long prompt."""
    told: dict[str, Any] = {
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
        "code": error.code,
    }
    if error.lengths is not None:
        told |= {"n_prompt_tokens": error.lengths.prompt, "n_ctx": error.lengths.context}
    return {"error": told}


class ErrorResponse(Response):
    """One failure, in the form of the route that it answers; a 503 says when to come back."""

    def __init__(self, error: MinisrvError, headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if error.http_status == NotReadyError.http_status:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if error.code in _FINAL_CODES:  # the clients try a 500 again
            headers[RETRY_HEADER] = "false"
        super().__init__(_json(error_body(error)), error.http_status, headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        if speaks_anthropic(scope["path"]):
            body = messages_error(self._error, scope[CONTEXT_KEY].request_id)
            self.body = _json(body)
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def error_response(error: MinisrvError, headers: dict[str, str] | None = None) -> Response:
    """The whole response."""
    return ErrorResponse(error, headers)


def _json(body: dict[str, Any]) -> bytes:
    """In ASCII alone: a message may quote what the client sent."""
    return json.dumps(body).encode()


def add_error_handlers(app: FastAPI) -> None:
    """Answer our exceptions, the router's 404 and 405 and the framework's 422 in one form."""

    @app.exception_handler(MinisrvError)
    async def ours(request: Request, error: MinisrvError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routers(request: Request, error: HTTPException) -> Response:
        return error_response(_routing_error(request, error), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def frameworks(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return error_response(InvalidRequestError(f"{place}: {first['msg']}", param=place))


def _routing_error(request: Request, error: HTTPException) -> MinisrvError:
    place = f"{request.method} {request.url.path}"
    sentences = {
        404: f"there is no {place}; /docs lists what there is",
        405: f"{place} is not allowed; allowed: {(error.headers or {}).get('Allow', 'nothing')}",
    }
    answer = InvalidRequestError(sentences.get(error.status_code, str(error.detail)))
    answer.http_status = error.status_code
    return answer
