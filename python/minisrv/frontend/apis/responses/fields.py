"""The fields of POST /v1/responses."""

from __future__ import annotations

from minisrv.frontend.fields.common import (
    CONVERSATION_FIELDS,
    GENERATION_FIELDS,
    PENALTY_FIELDS,
    REASONING_EFFORTS,
    REQUEST_FIELDS,
    SAMPLING_FIELDS,
    STOP_FIELDS,
)
from minisrv.frontend.fields.schema import (
    ANY,
    BOOLEAN,
    INTEGER,
    OBJECT,
    STRING,
    STRINGS,
    any_of,
    array_of,
    object_of,
    one_of,
)
from minisrv.frontend.fields.table import Field, ignored, rejected, supported

_FORMAT = object_of(
    ["type"],
    type=one_of("text", "json_object", "json_schema"),
    name=STRING,
    description=STRING,
    schema=OBJECT,
    strict=BOOLEAN,
)
_TEXT = object_of(format=_FORMAT, verbosity=one_of("low", "medium", "high"))
_REASONING = object_of(
    effort=one_of(*REASONING_EFFORTS), summary=ANY, generate_summary=ANY, context=ANY, mode=ANY
)
_TOOL = object_of(
    ["type"],
    type=STRING,
    name=STRING,
    description=STRING,
    parameters=OBJECT,
    strict=BOOLEAN,
    format=OBJECT,
    tools=array_of(OBJECT),
)
_TOOL_CHOICE = any_of(
    STRING,
    object_of(
        ["type"],
        type=STRING,
        name=STRING,
        namespace=STRING,
        mode=one_of("auto", "required"),
        tools=array_of(object_of(["type"], type=STRING)),
    ),
)
_IGNORED = (
    *("user", "safety_identifier", "service_tier", "client_metadata"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)

RESPONSE_FIELDS: dict[str, Field] = {
    "input": supported(any_of(STRING, array_of(OBJECT)), "A text, or the conversation as items."),
    "instructions": supported(STRING, "A system message before the input."),
    **REQUEST_FIELDS,
    **SAMPLING_FIELDS,
    **STOP_FIELDS,
    **PENALTY_FIELDS,
    "include_stop_str_in_output": GENERATION_FIELDS["include_stop_str_in_output"],
    **CONVERSATION_FIELDS,
    "max_output_tokens": supported(
        INTEGER, "Maximum output tokens, at least 1. Default: the rest of the context."
    ),
    "text": supported(_TEXT, "format: text, a JSON object, or JSON that matches a schema."),
    "reasoning": supported(_REASONING, "effort: none turns reasoning off."),
    "tools": supported(
        array_of(_TOOL),
        "Functions, namespaces of functions, and custom tools; others are left out.",
    ),
    "tool_choice": supported(
        _TOOL_CHOICE, "none, auto, required, a tool or allowed_tools. Default: auto with tools."
    ),
    "include": supported(
        STRINGS, "Encrypted reasoning and results of hosted tools, which change nothing."
    ),
    "metadata": supported(OBJECT, "Strings by name; the reply repeats them."),
    "stream_options": supported(
        object_of(include_obfuscation=BOOLEAN), "Only with stream; changes nothing here."
    ),
    **dict.fromkeys(_IGNORED, ignored()),
    "store": supported(
        BOOLEAN, "Keep the response, for previous_response_id and item_reference. Default: true."
    ),
    "previous_response_id": supported(
        STRING, "A stored response; its input and output come before the input."
    ),
    "conversation": rejected(reason="it keeps responses, not conversations"),
    "background": rejected(False, reason="it runs nothing in the background"),
    **dict.fromkeys(
        ("background_options", "max_tool_calls", "moderation", "image", "access_programs"),
        rejected(),
    ),
    "context_management": rejected([]),
    "truncation": rejected("disabled", reason="no prompt is cut"),
    "prompt": rejected(reason="it stores no prompts"),
    "top_logprobs": rejected(0, reason="only chat completions return log probabilities"),
}
