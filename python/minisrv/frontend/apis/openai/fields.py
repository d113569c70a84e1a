"""The fields of /v1/chat/completions and /v1/completions, and how those of both are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.common import CONVERSATION_FIELDS, GENERATION_FIELDS, REASONING_EFFORTS
from minisrv.frontend.fields.grammar import read_grammar
from minisrv.frontend.fields.names import FieldNames, alias_names, merge_aliases
from minisrv.frontend.fields.schema import (
    ANY,
    BOOLEAN,
    INTEGER,
    INTEGERS,
    OBJECT,
    STRING,
    any_of,
    array_of,
    between,
    object_of,
    one_of,
)
from minisrv.frontend.fields.table import Field, Treatment, rejected, supported
from minisrv.frontend.generation.request import read_common, read_sampling
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.sampling_params import MAX_LOGPROBS

Fields = Mapping[str, Any]

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

_TOOL_CALL = object_of(["function"], function=OBJECT)
_MESSAGE = object_of(
    ["role"],
    role=one_of(*ROLES),
    content=any_of(STRING, array_of(OBJECT)),
    name=STRING,
    tool_call_id=STRING,
    tool_calls=array_of(_TOOL_CALL),
    reasoning_content=STRING,
    reasoning=STRING,
)
_FUNCTION = object_of(["name"], name=STRING, description=STRING, parameters=OBJECT, strict=BOOLEAN)
_TOOL = object_of(["type"], type=STRING, function=_FUNCTION)
_TOOL_CHOICE = any_of(
    STRING, object_of(["type"], type=STRING, function=object_of(["name"], name=STRING))
)

_NUM_LOGPROBS = between(0, MAX_LOGPROBS, INTEGER)
CHAT_FIELDS: dict[str, Field] = {
    "messages": supported(array_of(_MESSAGE), "The conversation; required unless prompt is given."),
    "prompt": supported(
        any_of(STRING, INTEGERS), "Text or token ids instead of messages; no template is applied."
    ),
    **GENERATION_FIELDS,
    **CONVERSATION_FIELDS,
    "max_tokens": supported(
        INTEGER, "The older name of max_completion_tokens, which takes precedence."
    ),
    "max_completion_tokens": supported(
        INTEGER, "Maximum output tokens, at least 1. Default: the rest of the context."
    ),
    "logprobs": supported(
        BOOLEAN,
        "Return the log probability of each token, before temperature, penalties and grammar.",
    ),
    "top_logprobs": supported(
        _NUM_LOGPROBS, "0 to 20: how many of the likeliest tokens to return too; needs logprobs."
    ),
    "tools": supported(array_of(_TOOL), "Functions that the model may call; see docs/tools.md."),
    "tool_choice": supported(
        _TOOL_CHOICE, "none, auto, required or a function. Default: auto with tools."
    ),
    "functions": rejected([]),
    "function_call": rejected("none", "auto"),
    "reasoning_effort": supported(
        one_of(*REASONING_EFFORTS), "none turns reasoning off; the others are for the template."
    ),
    "chat_template": Field(Treatment.REJECTED, ANY, flag="--trust-request-chat-template"),
    "add_generation_prompt": supported(
        BOOLEAN, "End the prompt with the start of the assistant's turn. Default: true."
    ),
    "continue_final_message": supported(
        BOOLEAN, "Continue the text of the last message instead of starting a turn."
    ),
    "modalities": rejected(["text"]),
    **dict.fromkeys(("audio", "web_search_options", "moderation"), rejected()),
}

COMPLETION_FIELDS: dict[str, Field] = {
    "prompt": supported(
        any_of(STRING, array_of(STRING), INTEGERS, array_of(INTEGERS)),
        "Text, token ids, or a list of either.",
    ),
    **GENERATION_FIELDS,
    "max_tokens": supported(
        INTEGER, "Maximum output tokens, at least 1, or 0 with echo. Default: 16."
    ),
    "best_of": supported(INTEGER, "1 or n, since every choice is returned."),
    "echo": supported(BOOLEAN, "Put the prompt in front of the text; max_tokens may then be 0."),
    "suffix": rejected(""),
    "logprobs": supported(
        _NUM_LOGPROBS,
        "0 to 20: return the log probability of each token, and of this many of the likeliest.",
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


def field_names(fields: Fields) -> FieldNames:
    """How the client named fields that have two names."""
    sent = {"max_tokens": "max_completion_tokens"} if "max_completion_tokens" in fields else {}
    return FieldNames(alias_names(fields) | sent)


def read_generation(fields: Fields, model: ModelInfo, **own: Any) -> dict[str, Any]:
    """The fields of a GenerationRequest. own: sampling parameters that the two read differently.

    Raises InvalidRequestError.
    """
    merged = merge_aliases(fields)
    common = read_common(
        fields,
        model,
        progress=fields.get("return_progress", False),
        token_ids=merged.get("return_token_ids", False),
        prompt_text=fields.get("return_prompt", False),
        timings=fields.get("timings", False),
    )
    if not common["reply"].stream:
        for option in ("stream_options", "return_progress"):
            if fields.get(option):
                raise InvalidRequestError(f"{option} needs stream to be true", param=option)
    return {**common, "sampling": read_sampling(merged, model, grammar=read_grammar(fields), **own)}
