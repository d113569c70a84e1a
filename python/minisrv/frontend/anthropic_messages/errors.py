"""Failures in Anthropic's form, for the routes that speak it."""

from __future__ import annotations

from typing import Any

from minisrv.errors import MinisrvError

PATH = "/v1/messages"

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"type": "string", "enum": ["error"]},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def speaks_anthropic(path: str) -> bool:
    """Whether a path belongs to these routes."""
    return path == PATH or path.startswith(PATH + "/")


def messages_error(error: MinisrvError, request_id: str) -> dict[str, Any]:
    """The body, or the data of a stream's last event; it names the field in the message."""
    status = error.http_status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": _message(error)},
        "request_id": request_id,
    }


def _message(error: MinisrvError) -> str:
    if error.code == "context_length_exceeded":  # agents look for these words, and shorten it
        return f"prompt is too long: {error.message}"
    if error.param is not None and error.param not in error.message:
        return f"{error.param}: {error.message}"
    return error.message
