"""Errors in Anthropic's form."""

from __future__ import annotations

from typing import Any

from minisrv.errors import MinisrvError
from minisrv.frontend.fields.schema import STRING, object_of, one_of
from minisrv.frontend.http.error_format import ErrorFormat

ERROR_SCHEMA = object_of(
    ["type", "error", "request_id"],
    type=one_of("error"),
    error=object_of(["type", "message"], type=STRING, message=STRING),
    request_id=STRING,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# The package's tool runner then sends the whole conversation instead.
_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


class AnthropicErrorFormat(ErrorFormat):
    """There is no `param`: the message names the field."""

    id_header = "Request-Id"

    def body(self, error: MinisrvError, request_id: str) -> dict[str, Any]:
        status = error.http_status
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        fields: dict[str, Any] = {"type": kind, "message": _message(error)}
        if error.param == "thread":
            fields["details"] = _NO_THREADS
        return {"type": "error", "error": fields, "request_id": request_id}


def _message(error: MinisrvError) -> str:
    if error.code == "context_length_exceeded":
        return _length_message(error)
    if error.param is not None and not error.message.startswith(error.param):
        return f"{error.param}: {error.message}"
    return error.message


def _length_message(error: MinisrvError) -> str:
    """In the words that agents look for when they decide what to shorten."""
    if error.lengths is None:
        return f"prompt is too long: {error.message}"
    prompt, output, context = error.lengths.prompt, error.lengths.output, error.lengths.context
    if prompt >= context:
        return f"prompt is too long: {prompt} tokens > {context - 1} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {prompt} + {output} > "
        f"{context}; reduce one of them"
    )
