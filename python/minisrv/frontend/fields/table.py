"""The fields of a request, once: what is done with each, its check and its place in /docs.

A field is supported, harmless (accepted; changes nothing here) or unsupported: refused by name
unless its value is null or asks for nothing. Names that no table holds are reported, not dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.grammar import JSON_SCHEMA, RESPONSE_FORMAT, STRUCTURED_OUTPUTS
from minisrv.frontend.fields.schema import (
    ANY,
    BOOLEAN,
    INTEGER,
    INTEGERS,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    Schema,
    any_of,
    array_of,
    check_value,
    describe,
    one_of,
)

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Treatment(Enum):
    """What the server does with a field."""

    SUPPORTED = auto()
    IGNORED = auto()
    REJECTED = auto()


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request; `neutral` are the values of an unsupported field that pass.

    reason: why it is not supported, for the refusal.
    flag: the option of the server that makes an unsupported field an supported one.
    """

    treatment: Treatment
    schema: Schema
    neutral: tuple[Any, ...] = ()
    reason: str = ""
    flag: str | None = None


def _supported(schema: Schema, description: str) -> Field:
    return Field(Treatment.SUPPORTED, {**schema, "description": description})


def _ignored() -> Field:
    return Field(Treatment.IGNORED, {**ANY, "description": "Accepted; it changes nothing here."})


def _rejected(*neutral: Any) -> Field:
    return Field(Treatment.REJECTED, ANY, neutral)


_STREAM_OPTIONS: Schema = {
    "type": "object",
    "properties": {
        "include_usage": BOOLEAN,
        "continuous_usage_stats": BOOLEAN,
        "include_obfuscation": BOOLEAN,
    },
}
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

_GENERATION_FIELDS: dict[str, Field] = {
    "model": _supported(STRING, "The served model; missing or empty is the same."),
    "temperature": _supported(NUMBER, "0 to 2; 0 is greedy. Default: the model's, else 1."),
    "top_p": _supported(NUMBER, "Above 0, up to 1. Default: the model's, else 1."),
    "top_k": _supported(INTEGER, "0 or -1 keeps all tokens. Default: the model's, else 0."),
    "min_p": _supported(NUMBER, "0 to 1. Default: the model's, else 0."),
    "seed": _supported(INTEGER, "With it, the same request gives the same text."),
    "sampling_seed": _supported(INTEGER, "The same as seed."),
    "stop": _supported(any_of(STRING, array_of(STRING)), "The text ends before these."),
    "stop_token_ids": _supported(INTEGERS, "The text ends at these tokens."),
    "ignore_eos": _supported(BOOLEAN, "Go on past the model's end of text."),
    "min_tokens": _supported(INTEGER, "No end of text before so many output tokens."),
    "n": _supported(INTEGER, "Choices, 1 to 128."),
    "stream": _supported(BOOLEAN, "Answer with server-sent events."),
    "stream_options": _supported(_STREAM_OPTIONS, "Only with stream."),
    "skip_special_tokens": _supported(BOOLEAN, "Leave special tokens out of the text."),
    "response_format": _supported(RESPONSE_FORMAT, "Text, a JSON object, or JSON of a schema."),
    "structured_outputs": _supported(
        STRUCTURED_OUTPUTS, "One of json, json_object, regex, choice and grammar."
    ),
    "guided_json": _supported(JSON_SCHEMA, "The text is JSON of this schema."),
    "guided_regex": _supported(STRING, "The text matches this from end to end."),
    "guided_choice": _supported(STRINGS, "The text is one of these."),
    "guided_grammar": _supported(STRING, "The text is of this grammar, in Lark or GBNF."),
    "json_schema": _supported(JSON_SCHEMA, "As guided_json."),
    "regex": _supported(STRING, "As guided_regex."),
    "grammar": _supported(STRING, "As guided_grammar."),
    "ebnf": _supported(STRING, "As guided_grammar."),
    "cache_salt": _supported(
        STRING, "1 to 128 characters: cached prompts are shared with the same salt alone."
    ),
    "timings": _supported(BOOLEAN, "Tell what the request took, in `timings`."),
    "return_token_ids": _supported(BOOLEAN, "Give the token ids of prompt and output."),
    "return_tokens": _supported(BOOLEAN, "The same as return_token_ids."),
    "return_prompt": _supported(BOOLEAN, "Give the prompt's text as the model saw it."),
    "return_progress": _supported(BOOLEAN, "Stream how far the prompt is; only with stream."),
    "request_id": _supported(STRING, "The request's id, instead of X-Request-Id."),
    "rid": _supported(STRING, "The same as request_id."),
    "presence_penalty": _supported(NUMBER, "-2 to 2, taken once from tokens in the output."),
    "frequency_penalty": _supported(NUMBER, "-2 to 2, taken for each time in the output."),
    "repetition_penalty": _supported(
        NUMBER, "Above 0, up to 2, over prompt and output; 1 is off. Default: the model's, else 1."
    ),
    "logit_bias": _supported(OBJECT, "Token id to -100..100, added to the logit."),
    "repeat_penalty": _supported(NUMBER, "The same as repetition_penalty."),
    "include_stop_str_in_output": _supported(BOOLEAN, "Keep the stop string in the text."),
    "no_stop_trim": _supported(BOOLEAN, "The same as include_stop_str_in_output."),
    "user": _ignored(),
    "metadata": _ignored(),
    "store": _ignored(),
    "service_tier": _ignored(),
    "safety_identifier": _ignored(),
    "prompt_cache_key": _ignored(),
    "prompt_cache_options": _ignored(),
    "prompt_cache_retention": _ignored(),
    "verbosity": _ignored(),
    "prediction": _ignored(),
    "stop_regex": _rejected([]),
    "spaces_between_special_tokens": _rejected(True),
    "priority": _rejected(0),
    "truncate_prompt_tokens": _rejected(),
    "thinking_token_budget": _rejected(),
    "timings_per_token": _rejected(False),
    "bad_words": _rejected([]),
    "allowed_token_ids": _rejected(),
    "logprob_token_ids": _rejected([]),
    "prompt_logprobs": _rejected(),
}

CHAT_FIELDS: dict[str, Field] = {
    "messages": _supported(
        array_of(_MESSAGE), "The conversation; required unless prompt is given."
    ),
    "prompt": _supported(
        any_of(STRING, INTEGERS), "Text or token ids instead of messages; no template is applied."
    ),
    **_GENERATION_FIELDS,
    "max_tokens": _supported(INTEGER, "As max_completion_tokens, which goes before it."),
    "max_completion_tokens": _supported(
        INTEGER, "Most output tokens, at least 1. Default: the rest of the context."
    ),
    "chat_template_kwargs": _supported(OBJECT, "Variables for the chat template."),
    "logprobs": _supported(BOOLEAN, "Tell each token's log-probability, before any change to it."),
    "top_logprobs": _supported(INTEGER, "Tell the likeliest tokens too, 0 to 20; needs logprobs."),
    "tools": _supported(array_of(_TOOL), "Functions that the model may call; see docs/tools.md."),
    "tool_choice": _supported(
        _TOOL_CHOICE, "none, auto, required or a function. Default: auto with tools."
    ),
    "parallel_tool_calls": _supported(BOOLEAN, "false ends the reply with its first call."),
    "functions": _rejected([]),
    "function_call": _rejected("none", "auto"),
    "reasoning_effort": _supported(
        one_of(*REASONING_EFFORTS), "none turns thinking off; the template sees the others."
    ),
    "enable_thinking": _supported(BOOLEAN, "Whether the model thinks first, where it can choose."),
    "chat_template": Field(Treatment.REJECTED, ANY, flag="--trust-request-chat-template"),
    "add_generation_prompt": _supported(
        BOOLEAN, "End the prompt with the assistant's turn begun. Default: true."
    ),
    "continue_final_message": _supported(
        BOOLEAN, "Go on with the text of the last message instead of a new turn."
    ),
    "modalities": _rejected(["text"]),
    "audio": _rejected(),
    "web_search_options": _rejected(),
    "moderation": _rejected(),
}

COMPLETION_FIELDS: dict[str, Field] = {
    "prompt": _supported(
        any_of(STRING, array_of(STRING), INTEGERS, array_of(INTEGERS)),
        "Text, token ids, or a list of either.",
    ),
    **_GENERATION_FIELDS,
    "max_tokens": _supported(
        INTEGER, "Most output tokens, at least 1, or with echo 0. Default: 16."
    ),
    "best_of": _supported(INTEGER, "1 or n: each choice that is generated is returned."),
    "echo": _supported(BOOLEAN, "Put the prompt before the text; max_tokens may be 0 then."),
    "suffix": _rejected(""),
    "logprobs": _supported(
        INTEGER, "Tell log-probabilities of the text and of so many likeliest tokens, 0 to 20."
    ),
    "top_logprobs": _rejected(0),
    "messages": _rejected(),
}


def chat_fields(*, trust_template: bool) -> dict[str, Field]:
    """The fields of a chat; with `trust_template` it may bring a template."""
    if not trust_template:
        return CHAT_FIELDS
    template = _supported(STRING, "A Jinja template to use instead of the model's.")
    return CHAT_FIELDS | {"chat_template": template}


def read_fields(body: Any, table: Mapping[str, Field]) -> tuple[dict[str, Any], list[str]]:
    """The supported fields that are not null, checked; and the names that `table` does not hold.

    Raises InvalidRequestError naming the field.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body is {describe(body)}; it must be an object")
    supported: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            unknown.append(name)
        elif value is None or field.treatment is Treatment.IGNORED:
            continue
        elif field.treatment is Treatment.REJECTED:
            _check_neutral(name, value, field)
        else:
            check_value(value, field.schema, name)
            supported[name] = value
            unknown += _unknown_properties(name, value, field.schema)
    return supported, unknown


def _unknown_properties(name: str, value: Any, schema: Schema) -> list[str]:
    if "properties" not in schema:
        return []
    return [f"{name}.{part}" for part in value if part not in schema["properties"]]


def request_schema(table: Mapping[str, Field]) -> dict[str, Any]:
    """The JSON schema of a body, for /docs; unsupported fields are left out."""
    return {
        "type": "object",
        "properties": {
            name: field.schema
            for name, field in table.items()
            if field.treatment is not Treatment.REJECTED
        },
    }


def _check_neutral(name: str, value: Any, field: Field) -> None:
    for neutral in field.neutral:
        if value == neutral and isinstance(value, bool) == isinstance(neutral, bool):
            return
    if field.flag is not None:
        raise InvalidRequestError(
            f"{name} is not accepted by this server; it would have to be started with {field.flag}",
            param=name,
            code="unsupported_parameter",
        )
    passing = ", ".join(json.dumps(neutral) for neutral in (*field.neutral, None))
    reason = f" ({field.reason})" if field.reason else ""
    raise InvalidRequestError(
        f"{name} is not supported by this server{reason}; leave it out (accepted: {passing})",
        param=name,
        code="unsupported_parameter",
    )
