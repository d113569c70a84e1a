"""The form of an error body: OpenAI's, which is the default, and the protocol of others."""

from __future__ import annotations

from typing import Any, Protocol

from minisrv.errors import MinisrvError
from minisrv.wire.messages import Failure

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


class ErrorFormat(Protocol):
    """How an API writes errors."""

    @property
    def id_header(self) -> str | None:
        """The header in which clients look for the request id, besides ours."""

    def body(self, error: MinisrvError, request_id: str) -> dict[str, Any]:
        """The body of a response, or the data of a stream's last event."""


class DefaultErrorFormat:
    """OpenAI's error object."""

    id_header = None

    def body(self, error: MinisrvError, request_id: str) -> dict[str, Any]:
        """The body of a response."""
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
