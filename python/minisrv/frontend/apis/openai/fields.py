"""The fields of /v1/chat/completions and /v1/completions."""

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
    INTEGERS,
    OBJECT,
    STRING,
    Schema,
    any_of,
    array_of,
    one_of,
)
from minisrv.frontend.fields.table import Field, Treatment, rejected, supported

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

_MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": one_of(*ROLES),
        "content": any_of(STRING, array_of(OBJECT)),
        "name": STRING,
        "tool_call_id": STRING,
        "tool_calls": array_of(OBJECT),
        "reasoning_content": STRING,
        "reasoning": STRING,
    },
}

_TOOL: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": STRING,
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": STRING,
                "description": STRING,
                "parameters": OBJECT,
                "strict": BOOLEAN,
            },
        },
    },
}
_TOOL_CHOICE: Schema = any_of(
    STRING,
    {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": STRING,
            "function": {"type": "object", "required": ["name"], "properties": {"name": STRING}},
        },
    },
)

CHAT_FIELDS: dict[str, Field] = {
    "messages": supported(array_of(_MESSAGE), "The conversation; required unless prompt is given."),
    "prompt": supported(
        any_of(STRING, INTEGERS), "Text or token ids instead of messages; no template is applied."
    ),
    **GENERATION_FIELDS,
    **CONVERSATION_FIELDS,
    "max_tokens": supported(INTEGER, "As max_completion_tokens, which goes before it."),
    "max_completion_tokens": supported(
        INTEGER, "Most output tokens, at least 1. Default: the rest of the context."
    ),
    "logprobs": supported(BOOLEAN, "Tell each token's log-probability, before any change to it."),
    "top_logprobs": supported(INTEGER, "Tell the likeliest tokens too, 0 to 20; needs logprobs."),
    "tools": supported(array_of(_TOOL), "Functions that the model may call; see docs/tools.md."),
    "tool_choice": supported(
        _TOOL_CHOICE, "none, auto, required or a function. Default: auto with tools."
    ),
    "functions": rejected([]),
    "function_call": rejected("none", "auto"),
    "reasoning_effort": supported(
        one_of(*REASONING_EFFORTS), "none turns thinking off; the template sees the others."
    ),
    "chat_template": Field(Treatment.REJECTED, ANY, flag="--trust-request-chat-template"),
    "add_generation_prompt": supported(
        BOOLEAN, "End the prompt with the assistant's turn begun. Default: true."
    ),
    "continue_final_message": supported(
        BOOLEAN, "Go on with the text of the last message instead of a new turn."
    ),
    "modalities": rejected(["text"]),
    "audio": rejected(),
    "web_search_options": rejected(),
    "moderation": rejected(),
}

COMPLETION_FIELDS: dict[str, Field] = {
    "prompt": supported(
        any_of(STRING, array_of(STRING), INTEGERS, array_of(INTEGERS)),
        "Text, token ids, or a list of either.",
    ),
    **GENERATION_FIELDS,
    "max_tokens": supported(
        INTEGER, "Most output tokens, at least 1, or with echo 0. Default: 16."
    ),
    "best_of": supported(INTEGER, "1 or n: each choice that is generated is returned."),
    "echo": supported(BOOLEAN, "Put the prompt before the text; max_tokens may be 0 then."),
    "suffix": rejected(""),
    "logprobs": supported(
        INTEGER, "Tell log-probabilities of the text and of so many likeliest tokens, 0 to 20."
    ),
    "top_logprobs": rejected(0),
    "messages": rejected(),
}


def chat_fields(*, trust_template: bool) -> dict[str, Field]:
    """The fields of a chat; with `trust_template` it may bring a template."""
    if not trust_template:
        return CHAT_FIELDS
    template = supported(STRING, "A Jinja template to use instead of the model's.")
    return CHAT_FIELDS | {"chat_template": template}
