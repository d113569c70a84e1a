"""The messages of a chat, as chat templates know them."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.generation.request import Messages
from minisrv.frontend.generation.tool_arguments import read_arguments


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
            _read_tool_call(call, f"{path}.tool_calls.{i}")
            for i, call in enumerate(read["tool_calls"])
        ]
    if "content" in read:
        kinds = ("text", "refusal") if read["role"] == "assistant" else ("text",)
        read["content"] = _read_content(read["content"], f"{path}.content", kinds)
    elif read["role"] == "assistant" and (read.get("tool_calls") or "function_call" in read):
        read["content"] = None
    else:
        raise InvalidRequestError(
            f"{path}.content is missing; only an assistant message with tool calls may omit it",
            param=f"{path}.content",
        )
    return read


def _read_content(content: str | list[dict[str, Any]], path: str, kinds: tuple[str, ...]) -> str:
    """The text of all parts, each of one of these kinds."""
    if isinstance(content, str):
        return content
    return "".join(_read_part(part, f"{path}.{i}", kinds) for i, part in enumerate(content))


def _read_part(part: dict[str, Any], path: str, kinds: tuple[str, ...]) -> str:
    kind = part.get("type")
    if kind not in kinds:
        shown = f"of type {kind[:40]!r}" if isinstance(kind, str) else "without a type"
        raise InvalidRequestError(
            f"{path} is a part {shown}; this server accepts {' and '.join(kinds)} parts here",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequestError(f"{path}.{kind} must be a string", param=f"{path}.{kind}")
    return text


def _read_tool_call(call: dict[str, Any], path: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(
            f"{path}.function must be an object with a name", param=f"{path}.function"
        )
    arguments = read_arguments(function.get("arguments"))
    return {**call, "function": {**function, "arguments": arguments}}
