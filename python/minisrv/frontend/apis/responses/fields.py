"""The fields of POST /v1/responses: what is done with each, its check and its place in /docs."""

from __future__ import annotations

from typing import Any

from minisrv.frontend.fields.read_body import honoured
from minisrv.frontend.fields.schema import (
    ANY,
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
from minisrv.frontend.fields.table import CHAT_FIELDS, REASONING_EFFORTS, Field, Treatment

# Fields that mean here what they mean in a chat completion.
CHAT_NAMES = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "min_tokens", "skip_special_tokens", "include_stop_str_in_output"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("stream", "parallel_tool_calls", "enable_thinking", "chat_template_kwargs", "cache_salt"),
)

_TEXT: Schema = {
    "type": "object",
    "properties": {
        "format": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": one_of("text", "json_object", "json_schema"),
                "name": STRING,
                "description": STRING,
                "schema": OBJECT,
                "strict": BOOLEAN,
            },
        },
        "verbosity": one_of("low", "medium", "high"),
    },
}
_REASONING: Schema = {
    "type": "object",
    "properties": {
        "effort": one_of(*REASONING_EFFORTS),
        "summary": ANY,
        "generate_summary": ANY,
        "context": ANY,
        "mode": ANY,
    },
}
_TOOL: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": STRING,
        "name": STRING,
        "description": STRING,
        "parameters": OBJECT,
        "strict": BOOLEAN,
    },
}
_TOOL_CHOICE: Schema = any_of(
    STRING,
    {"type": "object", "required": ["type"], "properties": {"type": STRING, "name": STRING}},
)
_STREAM_OPTIONS: Schema = {"type": "object", "properties": {"include_obfuscation": BOOLEAN}}


def _harmless(reason: str = "it changes nothing here") -> Field:
    return Field(Treatment.HARMLESS, {**ANY, "description": f"Accepted; {reason}."})


def _unsupported(*neutral: Any, reason: str = "") -> Field:
    return Field(Treatment.UNSUPPORTED, ANY, neutral, reason)


_NO_STATE = "it keeps no state, so send the whole conversation as input"

RESPONSE_FIELDS: dict[str, Field] = {
    "input": honoured(any_of(STRING, array_of(OBJECT)), "A text, or the conversation as items."),
    "instructions": honoured(STRING, "A system message before the input."),
    **{name: CHAT_FIELDS[name] for name in CHAT_NAMES},
    "max_output_tokens": honoured(
        INTEGER, "Most output tokens, at least 1. Default: the rest of the context."
    ),
    "text": honoured(_TEXT, "The form of the text: text, a JSON object, or JSON of a schema."),
    "reasoning": honoured(_REASONING, "effort: none turns thinking off."),
    "tools": honoured(array_of(_TOOL), "Functions that the model may call; see docs/tools.md."),
    "tool_choice": honoured(
        _TOOL_CHOICE, "none, auto, required or a function. Default: auto with tools."
    ),
    "include": honoured(STRINGS, "reasoning.encrypted_content alone, which changes nothing."),
    "metadata": honoured(OBJECT, "Texts by name; they come back in the reply."),
    "stream_options": honoured(_STREAM_OPTIONS, "Only with stream; changes nothing here."),
    "request_id": CHAT_FIELDS["request_id"],
    "rid": CHAT_FIELDS["rid"],
    "store": _harmless("nothing is stored, and the reply says so"),
    "user": _harmless(),
    "safety_identifier": _harmless(),
    "service_tier": _harmless(),
    "prompt_cache_key": _harmless(),
    "prompt_cache_options": _harmless(),
    "prompt_cache_retention": _harmless(),
    "client_metadata": _harmless(),
    "previous_response_id": _unsupported(reason=_NO_STATE),
    "conversation": _unsupported(reason=_NO_STATE),
    "background": _unsupported(False, reason="it keeps no state"),
    "background_options": _unsupported(),
    "context_management": _unsupported([]),
    "max_tool_calls": _unsupported(),
    "truncation": _unsupported("disabled", reason="no prompt is cut"),
    "prompt": _unsupported(reason="it stores no prompts"),
    "top_logprobs": _unsupported(0, reason="chat completions have log-probabilities"),
    "moderation": _unsupported(),
    "image": _unsupported(),
    "access_programs": _unsupported(),
}
