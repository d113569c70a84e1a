"""The fields of POST /v1/messages and of its count_tokens."""

from __future__ import annotations

from minisrv.frontend.fields.common import (
    CONVERSATION_FIELDS,
    PENALTY_FIELDS,
    REQUEST_FIELDS,
    SAMPLING_FIELDS,
)
from minisrv.frontend.fields.schema import (
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

EFFORTS = ("low", "medium", "high", "xhigh", "max")

_BLOCKS = array_of(object_of(["type"], type=STRING))
_MESSAGE = object_of(
    ["role", "content"],
    role=one_of("user", "assistant", "system"),
    content=any_of(STRING, _BLOCKS),
)
_TOOL = object_of(
    ["name"],
    type=STRING,
    name=STRING,
    description=STRING,
    input_schema=OBJECT,
    input_examples=array_of(OBJECT),
    strict=BOOLEAN,
    defer_loading=BOOLEAN,
    allowed_callers=STRINGS,
)
_TOOL_CHOICE = object_of(
    ["type"],
    type=one_of("auto", "any", "tool", "none"),
    name=STRING,
    disable_parallel_tool_use=BOOLEAN,
)
_THINKING = object_of(
    ["type"],
    type=one_of("enabled", "disabled", "adaptive"),
    budget_tokens=INTEGER,
    display=one_of("summarized", "omitted"),
)
_FORMAT = object_of(["type", "schema"], type=one_of("json_schema"), schema=OBJECT)
_OUTPUT_CONFIG = object_of(effort=one_of(*EFFORTS), format=_FORMAT)

COUNT_FIELDS: dict[str, Field] = {
    "model": REQUEST_FIELDS["model"],
    "messages": supported(
        array_of(_MESSAGE), "The conversation; the reply continues an assistant's last turn."
    ),
    "system": supported(any_of(STRING, _BLOCKS), "Text, or blocks of text."),
    "tools": supported(array_of(_TOOL), "Tools of the client, with an input_schema."),
    "tool_choice": supported(_TOOL_CHOICE, "auto, any, tool or none. Default: auto with tools."),
    "thinking": supported(
        _THINKING, "Whether the model reasons first, if its template has a switch."
    ),
    "output_config": supported(
        _OUTPUT_CONFIG,
        "effort: a variable for the template. format: a JSON schema that the text matches.",
    ),
    "context_management": supported(
        object_of(edits=_BLOCKS), "Only edits that change nothing: clear_thinking that keeps all."
    ),
    "chat_template_kwargs": CONVERSATION_FIELDS["chat_template_kwargs"],
    **dict.fromkeys(("cache_control", "user_profile_id", "workspace_id", "betas"), ignored()),
    "mcp_servers": rejected([]),
    "speed": rejected("standard"),
}
MESSAGES_FIELDS: dict[str, Field] = {
    **COUNT_FIELDS,
    **REQUEST_FIELDS,
    **SAMPLING_FIELDS,
    **PENALTY_FIELDS,
    "max_tokens": supported(INTEGER, "Maximum output tokens, at least 1; required."),
    "stop_sequences": supported(STRINGS, "Strings before which the text ends."),
    **dict.fromkeys(("metadata", "service_tier", "billing_policy"), ignored()),
    **dict.fromkeys(
        ("compaction", "container", "fallback_credit_token", "inference_geo", "thread"), rejected()
    ),
    "diagnostics": rejected({}, {"previous_message_id": None}),
    "fallbacks": rejected([]),
}
