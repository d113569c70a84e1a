"""The fields of a chat that are about tools: checked, and turned into what the reply is read by."""

from __future__ import annotations

import re
from typing import Any

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.errors import InvalidRequestError
from minisrv.frontend.generation.assistant_message import CallReading

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Tools = tuple[dict[str, Any], ...]


def read_tools(
    fields: dict[str, Any], chat_format: ChatFormat
) -> tuple[Tools | None, CallReading | None]:
    """What the template shows and how calls are found: nothing without tools or with choice none.

    Raises InvalidRequestError.
    """
    tools = tuple(fields.get("tools", ()))
    names = _read_names(tools)
    if not tools or fields.get("tool_choice") == "none":
        return None, None
    if not chat_format.takes_tools or chat_format.tool_format is None:
        lacks = "shows calls in a way that this server does not know"
        if not chat_format.takes_tools:
            lacks = "takes no tools"
        raise InvalidRequestError(
            f"tools cannot be used: the chat template of this model {lacks}",
            param="tools",
            code="unsupported_parameter",
        )
    parallel = fields.get("parallel_tool_calls", True)
    return tools, CallReading(tool_format=chat_format.tool_format, names=names, parallel=parallel)


def _read_names(tools: Tools) -> tuple[str, ...]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools holds {len(tools)} tools; the limit is {MAX_TOOLS}", param="tools"
        )
    names = tuple(_read_name(tool, f"tools.{i}") for i, tool in enumerate(tools))
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidRequestError(
                f"two tools have the name {name}", param=f"tools.{i}.function.name"
            )
    return names


def _read_name(tool: dict[str, Any], path: str) -> str:
    if tool["type"] != "function":
        raise InvalidRequestError(
            f"{path} is a tool of type {tool['type'][:40]!r}; this server knows functions only",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    function = tool.get("function")
    if function is None:
        raise InvalidRequestError(f"{path}.function is missing", param=f"{path}.function")
    name: str = function["name"]
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{path}.function.name is {name[:80]!a}; it must be 1 to 64 letters, digits, dots, "
            "underscores and dashes",
            param=f"{path}.function.name",
        )
    return name


def read_must_call(fields: dict[str, Any], calls: CallReading | None) -> tuple[str, ...]:
    """Names of the tools one of which must be called. Raises InvalidRequestError."""
    choice = fields.get("tool_choice", "auto")
    if choice in ("none", "auto"):
        return ()
    name = None if choice == "required" else _read_named(choice)
    if calls is None:
        raise InvalidRequestError(
            "tool_choice asks for a call and there are no tools", param="tool_choice"
        )
    if name is None:
        return calls.names
    if name not in calls.names:
        raise InvalidRequestError(
            f"tool_choice names {name[:80]!a}, which is none of the tools",
            param="tool_choice.function.name",
        )
    return (name,)


def _read_named(choice: str | dict[str, Any]) -> str:
    if isinstance(choice, str):
        raise InvalidRequestError(
            f"tool_choice is {choice[:40]!a}; it must be none, auto, required or name a function",
            param="tool_choice",
        )
    if choice["type"] != "function":
        raise InvalidRequestError(
            f"tool_choice.type is {choice['type'][:40]!a}; an object must have the type function, "
            "and none, auto and required are texts",
            param="tool_choice.type",
            code="unsupported_parameter",
        )
    function = choice.get("function")
    if function is None:
        raise InvalidRequestError("tool_choice.function is missing", param="tool_choice.function")
    name: str = function["name"]
    return name
