"""Requests that are refused, in all APIs: the parts of their bodies and the check of the errors."""

from __future__ import annotations

import json
from typing import Any

from tests.support import anthropic_bodies
from tests.support.http_server import HttpServer

Body = dict[str, Any]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, GENERATE = "/v1/messages", "/generate"
HI = [{"role": "user", "content": "hi"}]
BASE: dict[str, Body] = {
    CHAT: {"messages": HI},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": HI, "max_tokens": 9},
    GENERATE: {"text": "hi"},
}


def json_with_infinity(body: Body) -> str:
    """JSON, in which an infinite float is a number that no double can hold."""
    return json.dumps(body).replace("Infinity", "1e999")


def refusal(
    server: HttpServer, path: str, body: Body, param: str, *, status: int = 400, code: Any = None
) -> str:
    """The message that refuses `body`; the error's `param` is the one given.

    Anthropic's errors have none: they begin with it, or at least speak of a short one.
    """
    sent = {name: value for name, value in {**BASE[path], **body}.items() if value is not None}
    headers = {"Content-Type": "application/json"}
    response = server.http.post(path, content=json_with_infinity(sent), headers=headers)
    assert response.status_code == status, response.text
    if path == MESSAGES:
        kind = "not_found_error" if status == 404 else "invalid_request_error"
        message = anthropic_bodies.error_of(response, kind)
        named = message.startswith((f"{param} ", f"{param}: "))
        assert named or (param in ("model", "messages") and has_word(param, message)), message
        return message
    error = response.json()["error"]
    assert error["param"] == param, error
    assert code is None or error["code"] == code
    return str(error["message"])


def sampling(**fields: Any) -> Body:
    return {"sampling_params": fields}


def chat_tool(name: str = "f", **fields: Any) -> Body:
    return {"type": "function", "function": {"name": name, **fields}}


def response_tool(name: str = "f", **fields: Any) -> Body:
    return {"type": "function", "name": name, **fields}


def message_tool(name: str = "f", **fields: Any) -> Body:
    return {"name": name, "input_schema": {"type": "object"}, **fields}


def chat_format(**schema: Any) -> Body:
    named = {"name": "n", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def response_format(**schema: Any) -> Body:
    return {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}}


def message_format(**schema: Any) -> Body:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def wrong_schema(name: str = "x") -> Body:
    """Only the tokenizer process finds out, which compiles it."""
    return {"type": "object", "properties": {name: {"type": "nonsense"}}}


def has_word(word: str, message: str) -> bool:
    """Whether the word stands in the message by itself: between quotes, spaces or slashes."""
    borders = " '\"/:,;."
    at = message.find(word)
    while at >= 0:
        before, after = message[at - 1 : at], message[at + len(word) :][:1]
        if before and before in borders and (not after or after in borders):
            return True
        at = message.find(word, at + 1)
    return False
