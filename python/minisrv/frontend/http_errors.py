"""Every failure leaves as OpenAI's error object, built here and nowhere else."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from minisrv.errors import InvalidRequestError, MinisrvError, NotReadyError
from minisrv.messages import Failure

RETRY_AFTER_S = 1

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
            },
        }
    },
}


def error_body(error: MinisrvError | Failure) -> dict[str, Any]:
    """The OpenAI body: message, type, param and code."""
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: MinisrvError, headers: dict[str, str] | None = None) -> Response:
    """The whole response; a 503 says when to come back."""
    headers = dict(headers or {})
    if error.http_status == NotReadyError.http_status:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if error.code == "request_aborted":  # the openai clients try a 500 again
        headers["X-Should-Retry"] = "false"
    # ASCII alone: a message may quote what the client sent.
    return Response(
        json.dumps(error_body(error)), error.http_status, headers, media_type="application/json"
    )


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
