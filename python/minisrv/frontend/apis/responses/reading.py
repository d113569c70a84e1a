"""From the fields of a response to those of a chat completion, and their errors back again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.apis.openai.chat import read_chat
from minisrv.frontend.apis.responses.conversation import read_conversation
from minisrv.frontend.apis.responses.fields import CHAT_NAMES
from minisrv.frontend.fields.names import rename_fields, rename_text
from minisrv.frontend.fields.schema import STRING, check_value
from minisrv.frontend.generation.request import Generation
from minisrv.frontend.registry.model_info import ModelInfo

Fields = dict[str, Any]

# What a chat's errors name, and what it is called here; the messages are named in `param` alone.
_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\bmax_(completion_)?tokens\b", "max_output_tokens"),
        (r"\bresponse_format\.json_schema\b", "text.format"),
        (r"\bresponse_format\b", "text.format"),
        (r"\breasoning_effort\b", "reasoning.effort"),
        (r"\b(tools\.\d+|tool_choice)\.function\b", r"\1"),
    )
)
_MESSAGES = re.compile(r"^messages\b")
_IGNORED_INCLUDES = ("reasoning.encrypted_content",)
_NAMED_SCHEMA = {"type": "object", "required": ["name", "schema"]}


def read_response(fields: Fields, model: ModelInfo) -> Generation:
    """Check the fields of a response. Raises InvalidRequestError in their names."""
    _check_include(fields.get("include", []))
    for name, text in fields.get("metadata", {}).items():
        check_value(text, STRING, f"metadata.{name[:64]}")
    chat: Fields = {name: fields[name] for name in CHAT_NAMES if name in fields}
    chat["messages"] = read_conversation(fields)
    if "stream_options" in fields:
        chat["stream_options"] = fields["stream_options"]
    if "max_output_tokens" in fields:
        chat["max_completion_tokens"] = fields["max_output_tokens"]
    if effort := fields.get("reasoning", {}).get("effort"):
        chat["reasoning_effort"] = effort
    if text_format := fields.get("text", {}).get("format"):
        chat["response_format"] = _read_format(text_format)
    if "tools" in fields:
        chat["tools"] = [_read_tool(tool, f"tools.{i}") for i, tool in enumerate(fields["tools"])]
    if "tool_choice" in fields:
        chat["tool_choice"] = _read_tool_choice(fields["tool_choice"])
    with named_as_here():
        generation = read_chat(chat, model)
    told = tuple(rename_text(warning, _NAMES) for warning in generation.warnings)
    return replace(generation, warnings=told)


@contextmanager
def named_as_here() -> Iterator[None]:
    """Let errors that name the fields of a chat name those of a response."""
    try:
        yield
    except MinisrvError as error:
        rename(error)
        raise


def rename(error: MinisrvError) -> None:
    """Put the names of a response's fields into the error."""
    rename_fields(error, _NAMES)
    error.param = error.param and _MESSAGES.sub("input", error.param)


def _check_include(names: list[str]) -> None:
    for i, name in enumerate(names):
        if name not in _IGNORED_INCLUDES:
            raise InvalidRequestError(
                f"include.{i} is {name[:60]!a}, which this server cannot give; leave it out",
                param=f"include.{i}",
                code="unsupported_parameter",
            )


def _read_format(text_format: Fields) -> Fields:
    if text_format["type"] != "json_schema":
        return {"type": text_format["type"]}
    check_value(text_format, _NAMED_SCHEMA, "text.format")
    return {"type": "json_schema", "json_schema": text_format}


def _read_tool(tool: Fields, path: str) -> Fields:
    if tool["type"] != "function":
        raise InvalidRequestError(
            f"{path} is a tool of type {tool['type'][:40]!a}; this server knows functions only",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    check_value(tool, {"type": "object", "required": ["name"]}, path)
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _read_tool_choice(choice: str | Fields) -> str | Fields:
    if isinstance(choice, str) or choice["type"] != "function":
        return choice
    check_value(choice, {"type": "object", "required": ["name"]}, "tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}
