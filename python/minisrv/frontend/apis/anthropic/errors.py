"""Failures in Anthropic's form, for the routes that speak it."""

from __future__ import annotations

import re
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

_SCHEMA = re.compile(r"^(tools\.\d+)\.function\.parameters\b")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# By it the package's tool runner knows to send the whole conversation instead.
_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def speaks_anthropic(path: str) -> bool:
    """Whether a path belongs to these routes."""
    return path == PATH or path.startswith(PATH + "/")


def messages_error(error: MinisrvError, request_id: str) -> dict[str, Any]:
    """The body, or the data of a stream's last event; it names the field in the message."""
    status = error.http_status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    told: dict[str, Any] = {"type": kind, "message": _message(error)}
    if error.param == "thread":
        told["details"] = _NO_THREADS
    return {"type": "error", "error": told, "request_id": request_id}


def _message(error: MinisrvError) -> str:
    if error.code == "context_length_exceeded":
        return _length_message(error)
    # What a chat says by a field is here said by the last turn.
    param = "messages" if error.param == "continue_final_message" else error.param
    message = _SCHEMA.sub(r"\1.input_schema", error.message)
    if param is not None and param not in error.message:
        return f"{param}: {message}"
    return message


def _length_message(error: MinisrvError) -> str:
    """In the words that agents look for, to send less of the one or the other."""
    if error.lengths is None:
        return f"prompt is too long: {error.message}"
    prompt, output, context = error.lengths.prompt, error.lengths.output, error.lengths.context
    if prompt >= context:
        return f"prompt is too long: {prompt} tokens > {context - 1} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {prompt} + {output} > "
        f"{context}; send less of one of them"
    )
