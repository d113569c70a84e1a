"""The fields of Anthropic's messages, as openai_types.py has OpenAI's: what is done with each."""

from __future__ import annotations

from minisrv.frontend.fields.common import CONVERSATION_FIELDS, GENERATION_FIELDS
from minisrv.frontend.fields.schema import (
    BOOLEAN,
    INTEGER,
    OBJECT,
    STRING,
    STRINGS,
    Schema,
    any_of,
    array_of,
    one_of,
)
from minisrv.frontend.fields.table import Field, ignored, rejected, supported

EFFORTS = ("low", "medium", "high", "xhigh", "max")

_BLOCK: Schema = {"type": "object", "required": ["type"], "properties": {"type": STRING}}
_BLOCKS = array_of(_BLOCK)
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": one_of("user", "assistant", "system"),
        "content": any_of(STRING, _BLOCKS),
    },
}
_TOOL: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "type": STRING,
        "name": STRING,
        "description": STRING,
        "input_schema": OBJECT,
        "input_examples": array_of(OBJECT),
        "strict": BOOLEAN,
        "defer_loading": BOOLEAN,
        "allowed_callers": STRINGS,
    },
}
_TOOL_CHOICE: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": one_of("auto", "any", "tool", "none"),
        "name": STRING,
        "disable_parallel_tool_use": BOOLEAN,
    },
}
_THINKING: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": one_of("enabled", "disabled", "adaptive"),
        "budget_tokens": INTEGER,
        "display": one_of("summarized", "omitted"),
    },
}
_FORMAT: Schema = {
    "type": "object",
    "required": ["type", "schema"],
    "properties": {"type": one_of("json_schema"), "schema": OBJECT},
}
_OUTPUT_CONFIG: Schema = {
    "type": "object",
    "properties": {"effort": one_of(*EFFORTS), "format": _FORMAT},
}
_CONTEXT_MANAGEMENT: Schema = {"type": "object", "properties": {"edits": _BLOCKS}}

# Fields that Anthropic's API does not have.
EXTENSIONS = (
    *("min_p", "seed", "min_tokens", "ignore_eos", "stop_token_ids", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
SAMPLING = ("temperature", "top_p", "top_k", "stream")


_PROMPT_FIELDS: dict[str, Field] = {
    "model": GENERATION_FIELDS["model"],
    "messages": supported(
        array_of(_MESSAGE), "The conversation; the reply goes on with a last turn of the assistant."
    ),
    "system": supported(any_of(STRING, _BLOCKS), "Text, or blocks of text."),
    "tools": supported(array_of(_TOOL), "Tools of the client, with an input_schema."),
    "tool_choice": supported(_TOOL_CHOICE, "auto, any, tool or none. Default: auto with tools."),
    "thinking": supported(
        _THINKING, "Whether the model thinks first, where it can choose. Default: the template's."
    ),
    "output_config": supported(
        _OUTPUT_CONFIG, "effort: a variable for the template. format: the text is JSON of a schema."
    ),
    "context_management": supported(
        _CONTEXT_MANAGEMENT, "Edits that change nothing: clear_thinking_20251015 that keeps all."
    ),
    "chat_template_kwargs": CONVERSATION_FIELDS["chat_template_kwargs"],
    "cache_control": ignored(),
    "user_profile_id": ignored(),
    "workspace_id": ignored(),
    "betas": ignored(),
    "mcp_servers": rejected([]),
    "speed": rejected("standard"),
}
COUNT_FIELDS: dict[str, Field] = _PROMPT_FIELDS
MESSAGES_FIELDS: dict[str, Field] = {
    **_PROMPT_FIELDS,
    **{
        name: GENERATION_FIELDS[name]
        for name in (*SAMPLING, *EXTENSIONS, "cache_salt", "request_id", "rid")
    },
    "max_tokens": supported(INTEGER, "Most output tokens, at least 1; required."),
    "stop_sequences": supported(STRINGS, "The text ends before these."),
    "metadata": ignored(),
    "service_tier": ignored(),
    "billing_policy": ignored(),
    "compaction": rejected(),
    "container": rejected(),
    "diagnostics": rejected({}, {"previous_message_id": None}),
    "fallback_credit_token": rejected(),
    "fallbacks": rejected([]),
    "inference_geo": rejected(),
    "thread": rejected(),
}
