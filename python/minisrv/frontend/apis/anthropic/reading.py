"""The fields of a message request, as those of a chat: one Generation for both."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.anthropic.conversation import chat_messages
from minisrv.frontend.apis.anthropic.fields import EXTENSIONS, SAMPLING
from minisrv.frontend.apis.openai.chat import read_chat
from minisrv.frontend.fields.names import rename_fields
from minisrv.frontend.fields.schema import describe
from minisrv.frontend.generation.request import Generation
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.sampling_params import Grammar

# How errors of the chat's fields are to be read here.
_NAMES = (
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^(tools\.\d+|tool_choice)\.function\.name\b"), r"\1.name"),
    (re.compile(r"^enable_thinking\b"), "thinking.type"),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_message_request(fields: dict[str, Any], model: ModelInfo) -> Generation:
    """Check the fields of POST /v1/messages. Raises InvalidRequestError naming them."""
    if "max_tokens" not in fields:
        raise InvalidRequestError("max_tokens is missing", param="max_tokens")
    return read_prompt(fields, model)


def read_prompt(fields: dict[str, Any], model: ModelInfo) -> Generation:
    """The same for a request without sampling. Raises InvalidRequestError."""
    _check_edits(fields.get("context_management", {}))
    chat = _chat_fields(fields, switches_reasoning=model.chat_format.switches_reasoning)
    try:
        generation = read_chat(chat, model)
    except InvalidRequestError as error:
        rename_fields(error, _NAMES)
        raise
    return _with_format(generation, fields.get("output_config", {}).get("format"))


def warnings(fields: dict[str, Any]) -> list[str]:
    """What the client is to know of fields that do less here than they say."""
    if fields.get("thinking", {}).get("budget_tokens") is not None:
        return ["thinking.budget_tokens is no limit here; max_tokens is one of reasoning and text"]
    return []


def _chat_fields(fields: dict[str, Any], *, switches_reasoning: bool) -> dict[str, Any]:
    names = ("model", *SAMPLING, *EXTENSIONS)
    chat = {name: fields[name] for name in names if name in fields}
    if "messages" not in fields:
        raise InvalidRequestError("messages is missing", param="messages")
    chat["messages"] = chat_messages(fields.get("system"), fields["messages"])
    chat["continue_final_message"] = chat["messages"][-1]["role"] == "assistant"
    if "stop_sequences" in fields:
        chat["stop"] = fields["stop_sequences"]
    chat["tools"] = [_tool(tool, f"tools.{i}") for i, tool in enumerate(fields.get("tools", []))]
    if "tool_choice" in fields:
        chat |= _read_choice(fields["tool_choice"])
    kind = fields.get("thinking", {}).get("type")
    # "adaptive" lets a model think that can; one that cannot has nothing to decide.
    if kind in ("enabled", "disabled") or (kind == "adaptive" and switches_reasoning):
        chat["enable_thinking"] = kind != "disabled"
    effort = fields.get("output_config", {}).get("effort")
    if effort is not None:
        given = chat.get("chat_template_kwargs", {})
        chat["chat_template_kwargs"] = {"reasoning_effort": effort, **given}
    return chat


def _tool(tool: dict[str, Any], path: str) -> dict[str, Any]:
    """The tool as a function. Raises InvalidRequestError for one that the server would run."""
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise _rejected(f"{path}.type", f"a tool of type {kind[:40]!a} is not known to this server")
    if tool.get("defer_loading"):
        raise _rejected(f"{path}.defer_loading", "all tools are shown to the model at once")
    if "direct" not in (tool.get("allowed_callers") or ["direct"]):
        raise _rejected(f"{path}.allowed_callers", "it is the model alone that calls tools")
    schema = tool.get("input_schema")
    if schema is None:
        raise InvalidRequestError(f"{path}.input_schema is missing", param=f"{path}.input_schema")
    if tool.get("input_examples"):
        schema = {**schema, "examples": tool["input_examples"]}
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": schema}
    shown = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": shown}


def _read_choice(choice: dict[str, Any]) -> dict[str, Any]:
    parallel = {"parallel_tool_calls": not choice.get("disable_parallel_tool_use", False)}
    if choice["type"] != "tool":
        return {"tool_choice": _CHOICES[choice["type"]], **parallel}
    name = choice.get("name")
    if name is None:
        raise InvalidRequestError("tool_choice.name is missing", param="tool_choice.name")
    return {"tool_choice": {"type": "function", "function": {"name": name}}, **parallel}


def _check_edits(context_management: dict[str, Any]) -> None:
    """What may stand there changes nothing: this server drops no reasoning, whatever is sent."""
    for i, edit in enumerate(context_management.get("edits") or []):
        keeps_all = edit.get("keep") in ("all", {"type": "all"})
        if edit["type"] != "clear_thinking_20251015" or not keeps_all:
            path = f"context_management.edits.{i}"
            raise _rejected(path, f"{describe(edit['type'])} would change the conversation")


def _with_format(generation: Generation, format: dict[str, Any] | None) -> Generation:
    if format is None:
        return generation
    param = "output_config.format"
    if generation.must_call:
        raise InvalidRequestError(
            f"send {param} or a tool_choice that asks for a call, not both", param="tool_choice"
        )
    grammar = Grammar.json_schema(format["schema"], f"{param}.schema")
    return replace(generation, sampling=replace(generation.sampling, grammar=grammar))


def _rejected(path: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{path} is not supported: {why}", param=path, code="unsupported_parameter"
    )
