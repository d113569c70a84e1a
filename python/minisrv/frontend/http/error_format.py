"""The form of an error body: OpenAI's, unless the API of the route has another."""

from __future__ import annotations

from typing import Any

from minisrv.errors import MinisrvError
from minisrv.wire.messages import Failure

_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
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
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
                "n_prompt_tokens": {"type": "integer"},
                "n_ctx": {"type": "integer"},
            },
        }
    },
}


class ErrorFormat:
    """How an API writes errors; a subclass replaces OpenAI's form.

    id_header: a header in which clients look for the request id, besides X-Request-Id.
    """

    id_header: str | None = None

    def body(self, error: MinisrvError, request_id: str) -> dict[str, Any]:
        """The body of a response, or the data of a stream's last event."""
        return error_body(error)


def error_body(error: MinisrvError | Failure) -> dict[str, Any]:
    """OpenAI's error object; a prompt that is too long adds llama.cpp's two counts."""
    fields: dict[str, Any] = {
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
        "code": error.code,
    }
    if error.lengths is not None:
        fields |= {"n_prompt_tokens": error.lengths.prompt, "n_ctx": error.lengths.context}
    return {"error": fields}
