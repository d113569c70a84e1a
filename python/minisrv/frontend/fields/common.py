"""Fields that several APIs have, under the same name and with the same meaning."""

from __future__ import annotations

from minisrv.frontend.fields.grammar import JSON_SCHEMA, RESPONSE_FORMAT, STRUCTURED_OUTPUTS
from minisrv.frontend.fields.names import ALIASES
from minisrv.frontend.fields.schema import (
    BOOLEAN,
    INTEGER,
    INTEGERS,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    Schema,
    any_of,
    object_of,
)
from minisrv.frontend.fields.table import Field, ignored, rejected, supported

# With ALIASES: fields that mean the same as another one.
_SYNONYMS = {
    "json_schema": "guided_json",
    "regex": "guided_regex",
    "grammar": "guided_grammar",
    "ebnf": "guided_grammar",
}
MAX_SALT_CHARS = 128
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

SALT = Schema({**STRING, "minLength": 1, "maxLength": MAX_SALT_CHARS})
_STREAM_OPTIONS = object_of(
    include_usage=BOOLEAN, continuous_usage_stats=BOOLEAN, include_obfuscation=BOOLEAN
)
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
_REJECTED = (
    *("truncate_prompt_tokens", "thinking_token_budget", "allowed_token_ids", "prompt_logprobs"),
)
# Every API has these two groups.
REQUEST_FIELDS: dict[str, Field] = {
    "model": supported(STRING, "A name of the served model; may be missing or empty."),
    "stream": supported(BOOLEAN, "Send the reply as server-sent events."),
    "cache_salt": supported(
        SALT, "1 to 128 characters; only requests with the same salt share cached prompts."
    ),
    "request_id": supported(STRING, "The request's id; overrides X-Request-Id."),
    "rid": supported(STRING, "The same as request_id."),
}
SAMPLING_FIELDS: dict[str, Field] = {
    "temperature": supported(NUMBER, "0 to 2; 0 is greedy. Default: the model's, else 1."),
    "top_p": supported(NUMBER, "Above 0, up to 1. Default: the model's, else 1."),
    "top_k": supported(INTEGER, "0 or -1 keeps all tokens. Default: the model's, else 0."),
    "min_p": supported(NUMBER, "0 to 1. Default: the model's, else 0."),
    "seed": supported(INTEGER, "The same request with the same seed gives the same text."),
    "stop_token_ids": supported(INTEGERS, "Tokens that end the text."),
    "ignore_eos": supported(BOOLEAN, "Continue past the model's end-of-text token."),
    "min_tokens": supported(
        INTEGER, "Minimum number of output tokens before an end-of-text token may end the text."
    ),
}
STOP_FIELDS: dict[str, Field] = {
    "stop": supported(any_of(STRING, STRINGS), "Strings before which the text ends."),
    "skip_special_tokens": supported(BOOLEAN, "Omit special tokens from the text."),
}
PENALTY_FIELDS: dict[str, Field] = {
    "presence_penalty": supported(
        NUMBER, "-2 to 2, subtracted once from the logit of each token in the output."
    ),
    "frequency_penalty": supported(
        NUMBER, "-2 to 2, subtracted from a token's logit once per occurrence in the output."
    ),
    "repetition_penalty": supported(
        NUMBER, "1e-6 to 2, over prompt and output; 1 is off. Default: the model's, else 1."
    ),
    "logit_bias": supported(OBJECT, "A bias by token id, -100 to 100, added to the logit."),
}
# Of chat completions and completions.
GENERATION_FIELDS: dict[str, Field] = {
    **REQUEST_FIELDS,
    **SAMPLING_FIELDS,
    **STOP_FIELDS,
    **PENALTY_FIELDS,
    "n": supported(INTEGER, "Number of choices, 1 to 128."),
    "stream_options": supported(_STREAM_OPTIONS, "Only with stream."),
    "include_stop_str_in_output": supported(
        BOOLEAN, "Keep the stop string at the end of the text."
    ),
    "response_format": supported(
        RESPONSE_FORMAT, "Free text, a JSON object, or JSON that matches a schema."
    ),
    "structured_outputs": supported(
        STRUCTURED_OUTPUTS, "One of json, json_object, regex, choice and grammar."
    ),
    "guided_json": supported(JSON_SCHEMA, "A JSON schema that the text matches."),
    "guided_regex": supported(STRING, "A regular expression that the whole text matches."),
    "guided_choice": supported(STRINGS, "Strings of which the text is one."),
    "guided_grammar": supported(STRING, "A grammar that the text follows, in Lark or GBNF."),
    "timings": supported(BOOLEAN, "Return how long each phase of the request took, in `timings`."),
    "return_token_ids": supported(BOOLEAN, "Return the token ids of prompt and output."),
    "return_prompt": supported(BOOLEAN, "Return the text of the prompt as the model sees it."),
    "return_progress": supported(BOOLEAN, "Report the progress of the prefill; only with stream."),
    **dict.fromkeys(_IGNORED, ignored()),
    **dict.fromkeys(_REJECTED, rejected()),
    "stop_regex": rejected([]),
    "spaces_between_special_tokens": rejected(True),
    "priority": rejected(0),
    "timings_per_token": rejected(False),
    "bad_words": rejected([]),
    "logprob_token_ids": rejected([]),
}
GENERATION_FIELDS |= {
    alias: supported(GENERATION_FIELDS[name].schema, f"The same as {name}.")
    for alias, name in (ALIASES | _SYNONYMS).items()
}
CONVERSATION_FIELDS: dict[str, Field] = {
    "chat_template_kwargs": supported(OBJECT, "Variables for the chat template."),
    "parallel_tool_calls": supported(BOOLEAN, "false ends the reply after its first call."),
    "enable_thinking": supported(
        BOOLEAN, "Whether the model reasons first, if its template has a switch."
    ),
}
