"""Reads the fields of a response into the neutral request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.conversation import read_conversation
from minisrv.frontend.apis.responses.history import GiveWay, History
from minisrv.frontend.apis.responses.tools import Tools
from minisrv.frontend.fields.names import FieldNames
from minisrv.frontend.fields.schema import STRING, check_value, object_of
from minisrv.frontend.fields.template import (
    effort_warnings,
    read_template_kwargs,
    reasoning_variables,
)
from minisrv.frontend.generation.request import (
    ChatPrompt,
    ChatRequest,
    read_common,
    read_sampling,
)
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.sampling_params import Grammar

Fields = Mapping[str, Any]

# Encrypted reasoning, which this server's is not, and what hosted tools return, which never run.
_HARMLESS_INCLUDES = (
    *("reasoning.encrypted_content", "web_search_call.", "file_search_call."),
    *("code_interpreter_call.", "computer_call_output."),
)

NAMES = FieldNames(
    {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "tool_choice.function": "tool_choice",
        "reasoning_effort": "reasoning.effort",
    }
)


async def read_response(
    fields: Fields, history: History, tools: Tools, model: ModelInfo, give_way: GiveWay
) -> ChatRequest:
    """Read a request for a response, in pieces. Raises InvalidRequestError.

    history, tools: what was read of it before.
    """
    common = read_common(fields, model, shows_cap=True)
    for key, text in fields.get("metadata", {}).items():
        check_value(text, STRING, f"metadata.{key[:64]}")
    _check_include(fields.get("include", []))
    if fields.get("stream_options") and not common["reply"].stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
    effort = fields.get("reasoning", {}).get("effort")
    variables = reasoning_variables(effort, fields.get("enable_thinking"), model.chat_format)
    own = read_template_kwargs(fields.get("chat_template_kwargs", {}))
    tool_use = tools.use(fields, model.chat_format)
    messages = await read_conversation(
        fields.get("instructions"), history, tools.left_out, give_way
    )
    grammar = _read_format(fields.get("text", {}).get("format") or {})
    if grammar is not None and tool_use is not None and tool_use.must_call:
        # A format goes on being sent beside a call that follows its own schema.
        tools.left_out.warn("text.format has no effect: tool_choice requires a call")
        grammar = None
    return ChatRequest(
        prompt=ChatPrompt(
            messages=messages,
            tools=tool_use,
            template_kwargs={**model.template_kwargs, **variables, **own},
        ),
        sampling=read_sampling(
            fields,
            model,
            grammar=grammar,
            max_tokens=fields.get("max_output_tokens"),
        ),
        warnings=(
            *effort_warnings(effort, model.chat_format, "reasoning.effort"),
            *tools.left_out.warnings,
        ),
        **common,
    )


def _check_include(names: list[str]) -> None:
    for i, name in enumerate(names):
        if not name.startswith(_HARMLESS_INCLUDES):
            raise InvalidRequestError(
                f"include.{i} is {name[:60]!a}, which this server cannot return; leave it out",
                param=f"include.{i}",
                code="unsupported_parameter",
            )


def _read_format(text_format: dict[str, Any]) -> Grammar | None:
    match text_format:
        case {"type": "json_object"}:
            return Grammar.json_object("text.format")
        case {"type": "json_schema"}:
            check_value(text_format, object_of(["name", "schema"]), "text.format")
            return Grammar.json_schema(text_format["schema"], "text.format.schema")
    return None
