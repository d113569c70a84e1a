"""Errors quote what the client wrote unchanged, also where it is the name of some field."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest

from minisrv.frontend.apis.native import PARAMETERS
from tests.support import anthropic_bodies
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.refusals import (
    BASE,
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    RESPONSES,
    Body,
    chat_format,
    chat_tool,
    has_word,
    message_format,
    message_tool,
    refusal,
    response_format,
    response_tool,
    sampling,
    wrong_schema,
)

# Names of fields, in one API or another, that a client may also choose for things of its own.
NAMES = (
    *("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "prompt"),
    *("stop", "stop_sequences", "messages", "messages.0", "tools.0.function", "tools.0.function.x"),
    *("tool_choice.function", "response_format", "response_format.json_schema", "text.format"),
    *("reasoning_effort", "enable_thinking", "temperature", "continue_final_message"),
    *("tools.1.name", "tool_choice.name"),
)


def fails_on_content(template: str) -> str:
    return template.replace("{%- for m in", "{{ raise_exception(messages[0].content) }}{% for m in")


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=backend) as running:
        yield running


@pytest.fixture(scope="module")
def strict() -> Iterator[HttpServer]:
    """Its chat template refuses every conversation, in the words of the first message."""
    backend = functools.partial(PlayedModel, template=fails_on_content(TEMPLATES["hermes"]))
    with serve(make_backend=backend) as running:
        yield running


# What errors quote of the client's own words: the API, the body with a word, and the field.
Quoting = tuple[str, Callable[[str], Body], str]
QUOTING: dict[str, list[Quoting]] = {
    "name of a tool given twice": [
        (CHAT, lambda word: {"tools": [chat_tool(word)] * 2}, "tools.1.function.name"),
        (RESPONSES, lambda word: {"tools": [response_tool(word)] * 2}, "tools.1.name"),
        (MESSAGES, lambda word: {"tools": [message_tool(word)] * 2}, "tools.1.name"),
    ],
    "invalid name of a tool": [
        (CHAT, lambda word: {"tools": [chat_tool(f"{word} a")]}, "tools.0.function.name"),
        (RESPONSES, lambda word: {"tools": [response_tool(f"{word} a")]}, "tools.0.name"),
        (MESSAGES, lambda word: {"tools": [message_tool(f"{word} a")]}, "tools.0.name"),
    ],
    "chosen function": [
        (
            CHAT,
            lambda word: {"tools": [chat_tool()], "tool_choice": chat_tool(word)},
            "tool_choice.function.name",
        ),
        (
            RESPONSES,
            lambda word: {"tools": [response_tool()], "tool_choice": response_tool(word)},
            "tool_choice.name",
        ),
        (
            MESSAGES,
            lambda word: {"tools": [message_tool()], "tool_choice": {"type": "tool", "name": word}},
            "tool_choice.name",
        ),
    ],
    "type of a tool": [
        (CHAT, lambda word: {"tools": [{"type": word}]}, "tools.0.type"),
        (MESSAGES, lambda word: {"tools": [message_tool(type=word)]}, "tools.0.type"),
    ],
    "choice": [
        (CHAT, lambda word: {"tool_choice": word}, "tool_choice"),
        (RESPONSES, lambda word: {"tool_choice": word}, "tool_choice"),
        (MESSAGES, lambda word: {"tool_choice": {"type": word}}, "tool_choice.type"),
    ],
    "property of a tool's schema": [
        (
            CHAT,
            lambda word: {
                "tools": [chat_tool(parameters=wrong_schema(word))],
                "tool_choice": "required",
            },
            "tools.0.function.parameters",
        ),
        (
            RESPONSES,
            lambda word: {
                "tools": [response_tool(parameters=wrong_schema(word))],
                "tool_choice": "required",
            },
            "tools.0.parameters",
        ),
        (
            MESSAGES,
            lambda word: {
                "tools": [message_tool(input_schema=wrong_schema(word))],
                "tool_choice": {"type": "any"},
            },
            "tools.0.input_schema",
        ),
    ],
    "property of a schema": [
        (
            CHAT,
            lambda word: chat_format(**wrong_schema(word)),
            "response_format.json_schema.schema",
        ),
        (RESPONSES, lambda word: response_format(**wrong_schema(word)), "text.format.schema"),
        (
            MESSAGES,
            lambda word: message_format(**wrong_schema(word)),
            "output_config.format.schema",
        ),
    ],
    "type in a schema": [
        (CHAT, lambda word: chat_format(type=word), "response_format.json_schema.schema"),
        (RESPONSES, lambda word: response_format(type=word), "text.format.schema"),
        (MESSAGES, lambda word: message_format(type=word), "output_config.format.schema"),
    ],
    "type of a format": [
        (CHAT, lambda word: {"response_format": {"type": word}}, "response_format.type"),
        (RESPONSES, lambda word: {"text": {"format": {"type": word}}}, "text.format.type"),
        (
            MESSAGES,
            lambda word: {"output_config": {"format": {"type": word, "schema": {}}}},
            "output_config.format.type",
        ),
    ],
    "role": [
        (CHAT, lambda word: {"messages": [{"role": word, "content": "a"}]}, "messages.0.role"),
        (
            RESPONSES,
            lambda word: {"input": [{"type": "message", "role": word, "content": "a"}]},
            "input.0.role",
        ),
        (MESSAGES, lambda word: {"messages": [{"role": word, "content": "a"}]}, "messages.0.role"),
    ],
    "type of content": [
        (
            CHAT,
            lambda word: {"messages": [{"role": "user", "content": [{"type": word}]}]},
            "messages.0.content.0.type",
        ),
        (RESPONSES, lambda word: {"input": [{"type": word}]}, "input.0.type"),
        (
            MESSAGES,
            lambda word: {"messages": [anthropic_bodies.turn("user", {"type": word})]},
            "messages.0.content.0.type",
        ),
    ],
    "include": [(RESPONSES, lambda word: {"include": [word]}, "include.0")],
    "text for a number": [
        (CHAT, lambda word: {"temperature": word}, "temperature"),
        (COMPLETIONS, lambda word: {"temperature": word}, "temperature"),
        (RESPONSES, lambda word: {"temperature": word}, "temperature"),
        (MESSAGES, lambda word: {"temperature": word}, "temperature"),
        (GENERATE, lambda word: sampling(temperature=word), "sampling_params.temperature"),
    ],
    "text for a limit": [
        (CHAT, lambda word: {"max_completion_tokens": word}, "max_completion_tokens"),
        (COMPLETIONS, lambda word: {"max_tokens": word}, "max_tokens"),
        (RESPONSES, lambda word: {"max_output_tokens": word}, "max_output_tokens"),
        (MESSAGES, lambda word: {"max_tokens": word}, "max_tokens"),
        (GENERATE, lambda word: sampling(max_new_tokens=word), "sampling_params.max_new_tokens"),
    ],
    "biased token": [
        (CHAT, lambda word: {"logit_bias": {word: 1}}, "logit_bias"),
        (COMPLETIONS, lambda word: {"logit_bias": {word: 1}}, "logit_bias"),
        (RESPONSES, lambda word: {"logit_bias": {word: 1}}, "logit_bias"),
    ],
    "effort": [
        (CHAT, lambda word: {"reasoning_effort": word}, "reasoning_effort"),
        (RESPONSES, lambda word: {"reasoning": {"effort": word}}, "reasoning.effort"),
        (MESSAGES, lambda word: {"output_config": {"effort": word}}, "output_config.effort"),
    ],
}


@pytest.mark.parametrize("word", NAMES)
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        pytest.param(*row, id=f"{what}-{row[0]}-{row[2]}")
        for what, rows in QUOTING.items()
        for row in rows
    ],
)
def test_an_error_quotes_the_word_that_was_sent(
    hermes: HttpServer, path: str, body: Callable[[str], Body], param: str, word: str
) -> None:
    message = refusal(hermes, path, body(word), param)
    assert has_word(word, message.removeprefix(param)), message


@pytest.mark.parametrize("word", NAMES)
@pytest.mark.parametrize("path", BASE)
def test_an_unknown_model_is_quoted_as_sent(hermes: HttpServer, path: str, word: str) -> None:
    model = f"{word}-7b"
    assert f"'{model}'" in refusal(hermes, path, {"model": model}, "model", status=404)


@pytest.mark.parametrize("word", NAMES)
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_what_the_chat_template_says_of_a_message_is_quoted_as_sent(
    strict: HttpServer, path: str, word: str
) -> None:
    text = f"{word}: no, {word} is wrong"
    param = "input" if path == RESPONSES else "messages"
    body = {param: [{"role": "user", "content": text}]}
    assert text in refusal(strict, path, body, param)


UNKNOWN = [name for name in NAMES if name not in PARAMETERS]


@pytest.mark.parametrize("word", UNKNOWN)
def test_an_unknown_sampling_parameter_is_named_as_sent(hermes: HttpServer, word: str) -> None:
    message = refusal(hermes, GENERATE, sampling(**{word: 1}), f"sampling_params.{word}")
    assert f"'{word}'" in message


@pytest.mark.parametrize("word", NAMES)
@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_variable_of_the_template_is_named_as_sent(
    hermes: HttpServer, path: str, word: str
) -> None:
    body = {"chat_template_kwargs": {word: math.inf}}
    refusal(hermes, path, body, f"chat_template_kwargs.{word}")


@pytest.mark.parametrize("word", NAMES)
def test_metadata_is_named_as_sent(hermes: HttpServer, word: str) -> None:
    refusal(hermes, RESPONSES, {"metadata": {word: 5}}, f"metadata.{word}")
