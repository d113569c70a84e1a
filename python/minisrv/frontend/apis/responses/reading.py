"""Reads the fields of a response into the neutral request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.conversation import read_conversation
from minisrv.frontend.fields.names import FieldNames
from minisrv.frontend.fields.schema import STRING, check_value
from minisrv.frontend.fields.template import (
    effort_warnings,
    read_template_kwargs,
    reasoning_variables,
)
from minisrv.frontend.fields.tools import (
    NamedTool,
    ToolChoice,
    ToolUse,
    check_is_function,
    plain_choice,
    read_tools,
)
from minisrv.frontend.generation.request import (
    ChatPrompt,
    ChatRequest,
    ReplyOptions,
    read_cache_salt,
    read_sampling,
    served_name,
)
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.sampling_params import Grammar

Fields = Mapping[str, Any]

NAMES = FieldNames(
    {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "tools.*.function": "tools.*",
        "tool_choice.function": "tool_choice",
        "reasoning_effort": "reasoning.effort",
    }
)
_IGNORED_INCLUDES = ("reasoning.encrypted_content",)
_NAMED = {"type": "object", "required": ["name"]}
_NAMED_SCHEMA = {"type": "object", "required": ["name", "schema"]}


def read_response(fields: Fields, model: ModelInfo) -> ChatRequest:
    """Read a request for a response. Raises InvalidRequestError."""
    name = served_name(fields.get("model"), model)
    for key, text in fields.get("metadata", {}).items():
        check_value(text, STRING, f"metadata.{key[:64]}")
    _check_include(fields.get("include", []))
    stream = fields.get("stream", False)
    if fields.get("stream_options") and not stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
    effort = fields.get("reasoning", {}).get("effort")
    variables = reasoning_variables(effort, fields.get("enable_thinking"), model.chat_format)
    own = read_template_kwargs(fields.get("chat_template_kwargs", {}))
    return ChatRequest(
        model=name,
        prompt=ChatPrompt(
            messages=read_conversation(fields),
            tools=_read_tools(fields, model),
            template_kwargs={**model.template_kwargs, **variables, **own},
        ),
        sampling=read_sampling(
            fields,
            model,
            grammar=_read_format(fields.get("text", {}).get("format")),
            max_tokens=fields.get("max_output_tokens"),
        ),
        reply=ReplyOptions(stream=stream),
        cache_salt=read_cache_salt(fields.get("cache_salt")),
        warnings=effort_warnings(effort, model.chat_format, "reasoning.effort"),
    )


def _check_include(names: list[str]) -> None:
    for i, name in enumerate(names):
        if name not in _IGNORED_INCLUDES:
            raise InvalidRequestError(
                f"include.{i} is {name[:60]!a}, which this server cannot return; leave it out",
                param=f"include.{i}",
                code="unsupported_parameter",
            )


def _read_format(text_format: dict[str, Any] | None) -> Grammar | None:
    match text_format and text_format["type"]:
        case "json_object":
            return Grammar.json_object("text.format")
        case "json_schema":
            check_value(text_format, _NAMED_SCHEMA, "text.format")
            assert text_format is not None
            return Grammar.json_schema(text_format["schema"], "text.format.schema")
    return None


def _read_tools(fields: Fields, model: ModelInfo) -> ToolUse | None:
    tools = [_function(tool, f"tools.{i}") for i, tool in enumerate(fields.get("tools", []))]
    choice = _read_tool_choice(fields.get("tool_choice", "auto"))
    return read_tools(tools, choice, fields.get("parallel_tool_calls", True), model.chat_format)


def _function(tool: dict[str, Any], path: str) -> dict[str, Any]:
    check_is_function(tool, path)
    check_value(tool, _NAMED, path)
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _read_tool_choice(choice: str | dict[str, Any]) -> ToolChoice:
    if isinstance(choice, str):
        return plain_choice(choice)
    check_is_function(choice, "tool_choice")
    check_value(choice, _NAMED, "tool_choice")
    return NamedTool(choice["name"])
