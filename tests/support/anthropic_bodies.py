"""Bodies of message requests, and the errors that answer them, for the tests."""

from __future__ import annotations

from typing import Any

from anthropic.types.shared import ErrorResponse

from tests.support.http_server import HttpServer

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {"name": "add", "input_schema": {"type": "object"}}
TIME: dict[str, Any] = {"name": "get_time", "input_schema": {"type": "object"}}


def send(server: HttpServer, **body: Any) -> Any:
    return server.http.post(PATH, json={"messages": HI, "max_tokens": 9, **body})


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": [text(b) if isinstance(b, str) else b for b in blocks]}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def use(id: str = "a", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": "add", "input": arguments}


def result(id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, **fields}


def error_of(response: Any, kind: str = "invalid_request_error") -> str:
    """The message of an error, checked with the package's own type."""
    error = ErrorResponse.model_validate_json(response.content, strict=True)
    assert error.error.type == kind
    assert not error.model_extra
    assert (error.error.model_extra or {}).keys() <= {"details"}
    assert error.request_id == response.headers["request-id"] == response.headers["x-request-id"]
    return error.error.message
