"""Checks the tools of a request, and turns them into what template and reply parser need.

The neutral form of a tool is that of chat templates, which is OpenAI's:
{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.schema import check_value, describe, object_of
from minisrv.frontend.tool_calls.formats import CallReading

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class NamedTool:
    """A tool choice: this tool must be called."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """shown: tools for the template. reading: how calls are found in the reply.

    must_call: one of the tools with these names must be called; empty for a free choice.
    """

    shown: tuple[dict[str, Any], ...]
    reading: CallReading
    must_call: tuple[str, ...] = ()


def read_tools(
    tools: Sequence[dict[str, Any]], choice: ToolChoice, parallel: bool, chat_format: ChatFormat
) -> ToolUse | None:
    """How the request uses its tools; None without tools and with the choice `none`.

    parallel: the reply may hold several calls; it never does if one tool is named. Raises
    InvalidRequestError.
    """
    names = _read_names(tools)
    if not tools and choice not in ("none", "auto"):
        raise InvalidRequestError(
            "tool_choice requires a call, but there are no tools", param="tool_choice"
        )
    if choice == "none" or not tools:
        return None
    if chat_format.tool_format is None:
        lacks = "does not accept tools"
        if chat_format.takes_tools:
            of = f" ({chat_format.unread_form})" if chat_format.unread_form else ""
            lacks = f"writes calls in a form that this server cannot read{of}"
        raise InvalidRequestError(
            f"tools cannot be used: the chat template of this model {lacks}",
            param="tools",
            code="unsupported_parameter",
        )
    if isinstance(choice, NamedTool) and choice.name not in names:
        raise InvalidRequestError(
            f"tool_choice.function.name is {choice.name[:80]!a}, which is not one of the tools",
            param="tool_choice.function.name",
        )
    parallel = parallel and not isinstance(choice, NamedTool)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    reading = CallReading(tool_format=chat_format.tool_format, schemas=schemas, parallel=parallel)
    must_call = (choice.name,) if isinstance(choice, NamedTool) else names
    return ToolUse(
        shown=tuple(tools), reading=reading, must_call=() if choice == "auto" else must_call
    )


def read_choice(choice: str | dict[str, Any], *, nested: bool) -> ToolChoice:
    """The choice that a string or an object names. Raises InvalidRequestError.

    nested: an object names its function under `function`, as in chat completions.
    """
    if isinstance(choice, dict):
        check_is_function(choice, "tool_choice")
        check_value(choice, object_of(["function" if nested else "name"]), "tool_choice")
        return NamedTool(choice["function"]["name"] if nested else choice["name"])
    match choice:
        case "none" | "auto" | "required":
            return choice
    raise InvalidRequestError(
        f"tool_choice is {choice[:40]!a}; it must be none, auto, required or name a function",
        param="tool_choice",
    )


def check_is_function(value: dict[str, Any], path: str) -> None:
    """Raise InvalidRequestError for a tool or a choice that has another type than `function`."""
    if value["type"] != "function":
        others = "; none, auto and required are strings" if path == "tool_choice" else ""
        raise InvalidRequestError(
            f"{path}.type is {describe(value['type'])}; it must be function{others}",
            param=f"{path}.type",
            code="unsupported_parameter",
        )


def _read_names(tools: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}", param="tools"
        )
    names: list[str] = []
    for i, tool in enumerate(tools):
        name, path = tool["function"]["name"], f"tools.{i}.function.name"
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"{path} is {name[:80]!a}; it must be 1 to 128 letters, digits, dots, "
                "underscores and dashes",
                param=path,
            )
        if name in names:
            raise InvalidRequestError(f"{path} repeats the name {name}", param=path)
        names.append(name)
    return tuple(names)
