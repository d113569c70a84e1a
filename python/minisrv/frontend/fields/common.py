"""Fields that several APIs have, under the same name and with the same meaning."""

from __future__ import annotations

from minisrv.frontend.fields.grammar import JSON_SCHEMA, RESPONSE_FORMAT, STRUCTURED_OUTPUTS
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
    array_of,
)
from minisrv.frontend.fields.table import Field, ignored, rejected, supported

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

_STREAM_OPTIONS: Schema = {
    "type": "object",
    "properties": {
        "include_usage": BOOLEAN,
        "continuous_usage_stats": BOOLEAN,
        "include_obfuscation": BOOLEAN,
    },
}
GENERATION_FIELDS: dict[str, Field] = {
    "model": supported(STRING, "The served model; missing or empty is the same."),
    "temperature": supported(NUMBER, "0 to 2; 0 is greedy. Default: the model's, else 1."),
    "top_p": supported(NUMBER, "Above 0, up to 1. Default: the model's, else 1."),
    "top_k": supported(INTEGER, "0 or -1 keeps all tokens. Default: the model's, else 0."),
    "min_p": supported(NUMBER, "0 to 1. Default: the model's, else 0."),
    "seed": supported(INTEGER, "With it, the same request gives the same text."),
    "sampling_seed": supported(INTEGER, "The same as seed."),
    "stop": supported(any_of(STRING, array_of(STRING)), "The text ends before these."),
    "stop_token_ids": supported(INTEGERS, "The text ends at these tokens."),
    "ignore_eos": supported(BOOLEAN, "Go on past the model's end of text."),
    "min_tokens": supported(INTEGER, "No end of text before so many output tokens."),
    "n": supported(INTEGER, "Choices, 1 to 128."),
    "stream": supported(BOOLEAN, "Answer with server-sent events."),
    "stream_options": supported(_STREAM_OPTIONS, "Only with stream."),
    "skip_special_tokens": supported(BOOLEAN, "Leave special tokens out of the text."),
    "response_format": supported(RESPONSE_FORMAT, "Text, a JSON object, or JSON of a schema."),
    "structured_outputs": supported(
        STRUCTURED_OUTPUTS, "One of json, json_object, regex, choice and grammar."
    ),
    "guided_json": supported(JSON_SCHEMA, "The text is JSON of this schema."),
    "guided_regex": supported(STRING, "The text matches this from end to end."),
    "guided_choice": supported(STRINGS, "The text is one of these."),
    "guided_grammar": supported(STRING, "The text is of this grammar, in Lark or GBNF."),
    "json_schema": supported(JSON_SCHEMA, "As guided_json."),
    "regex": supported(STRING, "As guided_regex."),
    "grammar": supported(STRING, "As guided_grammar."),
    "ebnf": supported(STRING, "As guided_grammar."),
    "cache_salt": supported(
        STRING, "1 to 128 characters: cached prompts are shared with the same salt alone."
    ),
    "timings": supported(BOOLEAN, "Tell what the request took, in `timings`."),
    "return_token_ids": supported(BOOLEAN, "Give the token ids of prompt and output."),
    "return_tokens": supported(BOOLEAN, "The same as return_token_ids."),
    "return_prompt": supported(BOOLEAN, "Give the prompt's text as the model saw it."),
    "return_progress": supported(BOOLEAN, "Stream how far the prompt is; only with stream."),
    "request_id": supported(STRING, "The request's id, instead of X-Request-Id."),
    "rid": supported(STRING, "The same as request_id."),
    "presence_penalty": supported(NUMBER, "-2 to 2, taken once from tokens in the output."),
    "frequency_penalty": supported(NUMBER, "-2 to 2, taken for each time in the output."),
    "repetition_penalty": supported(
        NUMBER, "Above 0, up to 2, over prompt and output; 1 is off. Default: the model's, else 1."
    ),
    "logit_bias": supported(OBJECT, "Token id to -100..100, added to the logit."),
    "repeat_penalty": supported(NUMBER, "The same as repetition_penalty."),
    "include_stop_str_in_output": supported(BOOLEAN, "Keep the stop string in the text."),
    "no_stop_trim": supported(BOOLEAN, "The same as include_stop_str_in_output."),
    "user": ignored(),
    "metadata": ignored(),
    "store": ignored(),
    "service_tier": ignored(),
    "safety_identifier": ignored(),
    "prompt_cache_key": ignored(),
    "prompt_cache_options": ignored(),
    "prompt_cache_retention": ignored(),
    "verbosity": ignored(),
    "prediction": ignored(),
    "stop_regex": rejected([]),
    "spaces_between_special_tokens": rejected(True),
    "priority": rejected(0),
    "truncate_prompt_tokens": rejected(),
    "thinking_token_budget": rejected(),
    "timings_per_token": rejected(False),
    "bad_words": rejected([]),
    "allowed_token_ids": rejected(),
    "logprob_token_ids": rejected([]),
    "prompt_logprobs": rejected(),
}
CONVERSATION_FIELDS: dict[str, Field] = {
    "chat_template_kwargs": supported(OBJECT, "Variables for the chat template."),
    "parallel_tool_calls": supported(BOOLEAN, "false ends the reply with its first call."),
    "enable_thinking": supported(BOOLEAN, "Whether the model thinks first, where it can choose."),
}
