"""Errors name the client's own fields in every API, those of the tokenizer process too."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from tests.support import anthropic_bodies
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.refusals import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    Body,
    chat_format,
    chat_tool,
    message_format,
    message_tool,
    refusal,
    response_format,
    response_tool,
    sampling,
    wrong_schema,
)


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=backend) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["plain"])
    with serve(make_backend=backend) as running:
        yield running


# A fault, and what each API calls the field.
STOPS = ["x"] * 17
LONG = 2_000_000
FAULTS: dict[str, list[tuple[str, Body, str]]] = {
    "no output": [
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": 0, "max_tokens": 5}, "max_completion_tokens"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (RESPONSES, {"max_output_tokens": 0}, "max_output_tokens"),
        (MESSAGES, {"max_tokens": 0}, "max_tokens"),
        (GENERATE, sampling(max_new_tokens=0), "sampling_params.max_new_tokens"),
        (GENERATE, sampling(max_tokens=0), "sampling_params.max_tokens"),
        (GENERATE, sampling(max_new_tokens=0, max_tokens=5), "sampling_params.max_new_tokens"),
    ],
    "too many stop strings": [
        (CHAT, {"stop": STOPS}, "stop"),
        (COMPLETIONS, {"stop": STOPS}, "stop"),
        (RESPONSES, {"stop": STOPS}, "stop"),
        (MESSAGES, {"stop_sequences": STOPS}, "stop_sequences"),
        (GENERATE, sampling(stop=STOPS), "sampling_params.stop"),
    ],
    "temperature out of range": [
        (CHAT, {"temperature": 3}, "temperature"),
        (COMPLETIONS, {"temperature": 3}, "temperature"),
        (RESPONSES, {"temperature": 3}, "temperature"),
        (MESSAGES, {"temperature": 3}, "temperature"),
        (GENERATE, sampling(temperature=3), "sampling_params.temperature"),
    ],
    "no prompt": [
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (RESPONSES, {"input": None}, "input"),
        (RESPONSES, {"input": []}, "input"),
        (MESSAGES, {"messages": None}, "messages"),
        (MESSAGES, {"messages": []}, "messages"),
        (GENERATE, {"text": None}, "text"),
        (GENERATE, {"text": None, "input_ids": []}, "input_ids"),
    ],
    "unknown token": [
        (COMPLETIONS, {"prompt": [10**6]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [10**6]]}, "prompt.1"),
        (GENERATE, {"text": None, "input_ids": [10**6]}, "input_ids"),
        (GENERATE, sampling(stop_token_ids=[10**6]), "sampling_params.stop_token_ids"),
    ],
    "tool name": [
        (CHAT, {"tools": [chat_tool("a b")]}, "tools.0.function.name"),
        (RESPONSES, {"tools": [response_tool("a b")]}, "tools.0.name"),
        (MESSAGES, {"tools": [message_tool("a b")]}, "tools.0.name"),
    ],
    "tool name given twice": [
        (CHAT, {"tools": [chat_tool()] * 2}, "tools.1.function.name"),
        (RESPONSES, {"tools": [response_tool()] * 2}, "tools.1.name"),
        (MESSAGES, {"tools": [message_tool()] * 2}, "tools.1.name"),
    ],
    "choice of a tool that is not there": [
        (
            CHAT,
            {"tools": [chat_tool()], "tool_choice": chat_tool("g")},
            "tool_choice.function.name",
        ),
        (
            RESPONSES,
            {"tools": [response_tool()], "tool_choice": response_tool("g")},
            "tool_choice.name",
        ),
        (
            MESSAGES,
            {"tools": [message_tool()], "tool_choice": {"type": "tool", "name": "g"}},
            "tool_choice.name",
        ),
    ],
    "tool schema": [
        (
            CHAT,
            {"tools": [chat_tool(parameters=wrong_schema())], "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        (
            RESPONSES,
            {"tools": [response_tool(parameters=wrong_schema())], "tool_choice": "required"},
            "tools.0.parameters",
        ),
        (
            MESSAGES,
            {"tools": [message_tool(input_schema=wrong_schema())], "tool_choice": {"type": "any"}},
            "tools.0.input_schema",
        ),
    ],
    "schema of the reply": [
        (CHAT, chat_format(**wrong_schema()), "response_format.json_schema.schema"),
        (COMPLETIONS, chat_format(**wrong_schema()), "response_format.json_schema.schema"),
        (COMPLETIONS, {"guided_json": wrong_schema()}, "guided_json"),
        (
            COMPLETIONS,
            {"structured_outputs": {"json": wrong_schema()}},
            "structured_outputs.json",
        ),
        (RESPONSES, response_format(**wrong_schema()), "text.format.schema"),
        (MESSAGES, message_format(**wrong_schema()), "output_config.format.schema"),
    ],
    "no schema": [
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            RESPONSES,
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "text.format.schema",
        ),
        (
            MESSAGES,
            {"output_config": {"format": {"type": "json_schema"}}},
            "output_config.format.schema",
        ),
    ],
    "reasoning asked for and switched off": [
        (CHAT, {"reasoning_effort": "low", "enable_thinking": False}, "reasoning_effort"),
        (RESPONSES, {"reasoning": {"effort": "low"}, "enable_thinking": False}, "reasoning.effort"),
    ],
}


# What errors of these APIs never speak of: the names that other APIs have for their fields.
FOREIGN: dict[str, tuple[str, ...]] = {
    CHAT: ("max_new_tokens", "max_output_tokens", "stop_sequences", "input_schema", "text.format"),
    COMPLETIONS: ("max_completion_tokens", "max_new_tokens", "max_output_tokens", "messages"),
    RESPONSES: ("max_tokens", "max_completion_tokens", "response_format", "function.", "_effort"),
    MESSAGES: ("max_completion_tokens", "function.", "response_format", "parameters"),
    GENERATE: ("max_completion_tokens", "max_output_tokens", "prompt"),
}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        pytest.param(*row, id=f"{fault}-{row[0]}-{row[2]}")
        for fault, rows in FAULTS.items()
        for row in rows
    ],
)
def test_each_api_names_its_own_field(
    hermes: HttpServer, path: str, body: Body, param: str
) -> None:
    message = refusal(hermes, path, body, param)
    for theirs in FOREIGN[path]:
        assert theirs not in message


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (COMPLETIONS, "max_tokens"),
        (RESPONSES, "max_output_tokens"),
        (MESSAGES, "max_tokens"),
    ],
)
def test_an_error_about_two_fields_names_one_and_the_value_of_the_other(
    hermes: HttpServer, path: str, limit: str
) -> None:
    message = refusal(hermes, path, {"min_tokens": 9, limit: 3}, "min_tokens")
    assert message.endswith("min_tokens is 9, more than the limit, 3")


@pytest.mark.parametrize("limit", ["max_tokens", "max_new_tokens"])
def test_a_native_error_about_two_fields_names_one(hermes: HttpServer, limit: str) -> None:
    body = sampling(min_tokens=9, **{limit: 3})
    message = refusal(hermes, GENERATE, body, "sampling_params.min_tokens")
    assert message == "sampling_params.min_tokens is 9, more than the limit, 3"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"max_tokens": LONG}, "messages"),
        (CHAT, {"max_completion_tokens": LONG}, "messages"),
        (COMPLETIONS, {"max_tokens": LONG}, "prompt"),
        (COMPLETIONS, {"max_tokens": LONG, "prompt": ["a", "b"]}, "prompt.0"),
        (COMPLETIONS, {"max_tokens": 999_990, "prompt": ["a", "b " * 20]}, "prompt.1"),
        (RESPONSES, {"max_output_tokens": LONG, "min_tokens": LONG}, "input"),
        (GENERATE, sampling(max_new_tokens=LONG), "text"),
        (GENERATE, {**sampling(max_tokens=LONG), "text": None, "input_ids": [5]}, "input_ids"),
    ],
    ids=str,
)
def test_a_request_over_the_context_names_the_prompt(
    hermes: HttpServer, path: str, body: Body, param: str
) -> None:
    message = refusal(hermes, path, body, param, code="context_length_exceeded")
    assert message.startswith("This model's maximum context length is 1000000 tokens.")


def test_a_message_over_the_context_is_refused_in_the_words_that_agents_match(
    hermes: HttpServer,
) -> None:
    response = anthropic_bodies.send(hermes, max_tokens=LONG, min_tokens=LONG)
    message = anthropic_bodies.error_of(response)
    assert message.startswith("input length and `max_tokens` exceed context limit: ")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": ""}]}, "messages"),
        (RESPONSES, {"input": ""}, "input"),
        (MESSAGES, {"messages": [{"role": "user", "content": ""}]}, "messages"),
    ],
    ids=str,
)
def test_a_prompt_without_tokens_is_named(
    plain: HttpServer, path: str, body: Body, param: str
) -> None:
    assert refusal(plain, path, body, param).startswith(f"{param} gives no token")
