"""The messages of a chat, as chat templates know them."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.parts import read_text
from minisrv.frontend.generation.request import Messages
from minisrv.frontend.generation.tool_arguments import read_arguments

_TEXT_PARTS = {"text": "text"}
_ASSISTANT_PARTS = {"text": "text", "refusal": "refusal"}


def read_messages(messages: list[dict[str, Any]] | None) -> Messages:
    """Messages with text content, tool arguments as objects, and no nulls.

    Raises InvalidRequestError naming the part.
    """
    if not messages:
        state = "missing" if messages is None else "empty"
        raise InvalidRequestError(
            f"messages is {state}; it must hold at least one message", param="messages"
        )
    return tuple(_read_message(message, f"messages.{i}") for i, message in enumerate(messages))


def _read_message(message: dict[str, Any], path: str) -> dict[str, Any]:
    read = {name: value for name, value in message.items() if value is not None}
    if "reasoning" in read:
        read.setdefault("reasoning_content", read["reasoning"])
    if "tool_calls" in read:
        read["tool_calls"] = [
            _read_call(call["function"], call, f"{path}.tool_calls.{i}.function")
            for i, call in enumerate(read["tool_calls"])
        ]
    by_assistant = read["role"] == "assistant"
    if "content" in read:
        parts = _ASSISTANT_PARTS if by_assistant else _TEXT_PARTS
        read["content"] = read_text(read["content"], parts, f"{path}.content")
    elif by_assistant and (read.get("tool_calls") or "function_call" in read):
        read["content"] = None
    else:
        raise InvalidRequestError(
            f"{path}.content is missing; only an assistant message with tool calls may omit it",
            param=f"{path}.content",
        )
    return read


def _read_call(function: dict[str, Any], call: dict[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{path} must be an object with a name", param=path)
    arguments = read_arguments(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}
