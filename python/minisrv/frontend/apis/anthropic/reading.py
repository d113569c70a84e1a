"""Reads the fields of a message request into the neutral request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.anthropic.conversation import chat_messages
from minisrv.frontend.fields.names import FieldNames
from minisrv.frontend.fields.schema import check_value, describe, object_of
from minisrv.frontend.fields.template import read_template_kwargs, reasoning_variables
from minisrv.frontend.fields.tools import NamedTool, ToolChoice, ToolUse, read_tools
from minisrv.frontend.generation.request import (
    ChatPrompt,
    ChatRequest,
    read_common,
    read_sampling,
    served_name,
)
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.sampling_params import Grammar

Fields = Mapping[str, Any]

NAMES = FieldNames(
    {
        "stop": "stop_sequences",
        "tools.*.function.name": "tools.*.name",
        "tools.*.function.parameters": "tools.*.input_schema",
        "tool_choice.function.name": "tool_choice.name",
        "enable_thinking": "thinking.type",
        "continue_final_message": "messages",
    }
)
_CHOICES: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "none": "none"}
_FORMAT = "output_config.format"
_WITH_SCHEMA = object_of(["input_schema"])


def read_message_request(fields: Fields, model: ModelInfo) -> ChatRequest:
    """Read a request for a message. Raises InvalidRequestError."""
    if "max_tokens" not in fields:
        raise InvalidRequestError("max_tokens is missing", param="max_tokens")
    common = read_common(fields, model, shows_cap=True)
    text_format = fields.get("output_config", {}).get("format")
    grammar = text_format and Grammar.json_schema(text_format["schema"], f"{_FORMAT}.schema")
    stop = {"stop": fields["stop_sequences"]} if "stop_sequences" in fields else {}
    warnings: tuple[str, ...] = ()
    if fields.get("thinking", {}).get("budget_tokens") is not None:
        warnings = ("thinking.budget_tokens is not enforced; max_tokens limits reasoning and text",)
    return ChatRequest(
        prompt=read_prompt(fields, model),
        sampling=read_sampling(
            fields, model, grammar=grammar, max_tokens=fields["max_tokens"], **stop
        ),
        warnings=warnings,
        **common,
    )


def read_prompt(fields: Fields, model: ModelInfo) -> ChatPrompt:
    """Read the conversation. Raises InvalidRequestError."""
    served_name(fields.get("model"), model)
    _check_edits(fields.get("context_management", {}))
    if "messages" not in fields:
        raise InvalidRequestError("messages is missing", param="messages")
    messages = chat_messages(fields.get("system"), fields["messages"])
    continues = messages[-1]["role"] == "assistant"
    return ChatPrompt(
        messages=tuple(messages),
        tools=_read_tools(fields, model),
        template_kwargs=_template_kwargs(fields, model),
        begins_turn=not continues,
        continues_last=continues,
    )


def _template_kwargs(fields: Fields, model: ModelInfo) -> dict[str, Any]:
    kind = fields.get("thinking", {}).get("type")
    enabled = kind != "disabled" if kind in ("enabled", "disabled") else None
    # "adaptive" lets a model reason that can; one that cannot has nothing to decide.
    if kind == "adaptive" and model.chat_format.switches_reasoning:
        enabled = True
    variables = reasoning_variables(None, enabled, model.chat_format)
    effort = fields.get("output_config", {}).get("effort")
    if effort is not None:
        variables["reasoning_effort"] = effort
    own = read_template_kwargs(fields.get("chat_template_kwargs", {}))
    return {**model.template_kwargs, **variables, **own}


def _read_tools(fields: Fields, model: ModelInfo) -> ToolUse | None:
    tools = [_function(tool, f"tools.{i}") for i, tool in enumerate(fields.get("tools", []))]
    choice = fields.get("tool_choice", {"type": "auto"})
    parallel = not choice.get("disable_parallel_tool_use", False)
    return read_tools(tools, _read_choice(choice), parallel, model.chat_format)


def _read_choice(choice: dict[str, Any]) -> ToolChoice:
    if choice["type"] != "tool":
        return _CHOICES[choice["type"]]
    check_value(choice, object_of(["name"]), "tool_choice")
    return NamedTool(choice["name"])


def _function(tool: dict[str, Any], path: str) -> dict[str, Any]:
    """The tool as templates know it. Raises InvalidRequestError for tools that servers run."""
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise _unsupported(
            f"{path}.type", f"this server does not know a tool of type {kind[:40]!a}"
        )
    if tool.get("defer_loading"):
        raise _unsupported(f"{path}.defer_loading", "all tools are shown to the model at once")
    if "direct" not in (tool.get("allowed_callers") or ["direct"]):
        raise _unsupported(f"{path}.allowed_callers", "only the model calls tools")
    check_value(tool, _WITH_SCHEMA, path)
    schema = tool["input_schema"]
    if tool.get("input_examples"):
        schema = {**schema, "examples": tool["input_examples"]}
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": schema}
    shown = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": shown}


def _check_edits(context_management: dict[str, Any]) -> None:
    """Only edits that change nothing are accepted: this server never drops reasoning."""
    for i, edit in enumerate(context_management.get("edits") or []):
        keeps_all = edit.get("keep") in ("all", {"type": "all"})
        if edit["type"] != "clear_thinking_20251015" or not keeps_all:
            path = f"context_management.edits.{i}"
            raise _unsupported(path, f"{describe(edit['type'])} would change the conversation")


def _unsupported(path: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{path} is not supported: {why}", param=path, code="unsupported_parameter"
    )
