"""The fields of POST /v1/responses: what is done with each, its check and its place in /docs."""

from __future__ import annotations

from minisrv.frontend.fields.common import (
    CONVERSATION_FIELDS,
    GENERATION_FIELDS,
    REASONING_EFFORTS,
)
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
from minisrv.frontend.fields.table import Field, ignored, rejected, supported

_COMMON_NAMES = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "min_tokens", "skip_special_tokens", "include_stop_str_in_output"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("stream", "cache_salt"),
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


_NO_STATE = "it keeps no state, so send the whole conversation as input"

RESPONSE_FIELDS: dict[str, Field] = {
    "input": supported(any_of(STRING, array_of(OBJECT)), "A text, or the conversation as items."),
    "instructions": supported(STRING, "A system message before the input."),
    **{name: GENERATION_FIELDS[name] for name in _COMMON_NAMES},
    **CONVERSATION_FIELDS,
    "max_output_tokens": supported(
        INTEGER, "Most output tokens, at least 1. Default: the rest of the context."
    ),
    "text": supported(_TEXT, "The form of the text: text, a JSON object, or JSON of a schema."),
    "reasoning": supported(_REASONING, "effort: none turns thinking off."),
    "tools": supported(array_of(_TOOL), "Functions that the model may call; see docs/tools.md."),
    "tool_choice": supported(
        _TOOL_CHOICE, "none, auto, required or a function. Default: auto with tools."
    ),
    "include": supported(STRINGS, "reasoning.encrypted_content alone, which changes nothing."),
    "metadata": supported(OBJECT, "Texts by name; they come back in the reply."),
    "stream_options": supported(_STREAM_OPTIONS, "Only with stream; changes nothing here."),
    "request_id": GENERATION_FIELDS["request_id"],
    "rid": GENERATION_FIELDS["rid"],
    "store": ignored("nothing is stored, and the reply says so"),
    "user": ignored(),
    "safety_identifier": ignored(),
    "service_tier": ignored(),
    "prompt_cache_key": ignored(),
    "prompt_cache_options": ignored(),
    "prompt_cache_retention": ignored(),
    "client_metadata": ignored(),
    "previous_response_id": rejected(reason=_NO_STATE),
    "conversation": rejected(reason=_NO_STATE),
    "background": rejected(False, reason="it keeps no state"),
    "background_options": rejected(),
    "context_management": rejected([]),
    "max_tool_calls": rejected(),
    "truncation": rejected("disabled", reason="no prompt is cut"),
    "prompt": rejected(reason="it stores no prompts"),
    "top_logprobs": rejected(0, reason="chat completions have log-probabilities"),
    "moderation": rejected(),
    "image": rejected(),
    "access_programs": rejected(),
}
