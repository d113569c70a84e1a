"""The form of an error body: OpenAI's, unless the API of the route has another."""

from __future__ import annotations

from typing import Any

from minisrv.errors import MinisrvError
from minisrv.frontend.fields.schema import INTEGER, STRING, Schema, any_of, object_of
from minisrv.wire.messages import Failure

_STRING_OR_NULL = any_of(STRING, Schema(type="null"))
ERROR_SCHEMA = object_of(
    ["error"],
    error=object_of(
        ["message", "type", "param", "code"],
        message=STRING,
        type=STRING,
        param=_STRING_OR_NULL,
        code=_STRING_OR_NULL,
        n_prompt_tokens=INTEGER,
        n_ctx=INTEGER,
    ),
)


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
