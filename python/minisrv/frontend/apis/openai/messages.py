"""The messages of a chat, as chat templates know them."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.parts import TextParts
from minisrv.frontend.generation.request import Messages

_TEXT_PARTS = TextParts(text="text")
_ASSISTANT_PARTS = TextParts(text="text", refusal="refusal")


def read_messages(messages: list[dict[str, Any]] | None) -> Messages:
    """Messages with text content and no nulls. Tool arguments stay as they came.

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
        for i, call in enumerate(read["tool_calls"]):
            if not isinstance(call["function"].get("name"), str):
                function = f"{path}.tool_calls.{i}.function"
                raise InvalidRequestError(
                    f"{function} must be an object with a name", param=function
                )
    by_assistant = read["role"] == "assistant"
    if "content" in read:
        parts = _ASSISTANT_PARTS if by_assistant else _TEXT_PARTS
        read["content"] = parts.read(read["content"], f"{path}.content")
    elif by_assistant and (read.get("tool_calls") or "function_call" in read):
        read["content"] = None
    else:
        raise InvalidRequestError(
            f"{path}.content is missing; only an assistant message with tool calls may omit it",
            param=f"{path}.content",
        )
    return read
