"""Holds recorded bodies to the own types of the openai and anthropic packages, strictly."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from anthropic.types import ErrorResponse, Message, MessageTokensCount, RawMessageStreamEvent
from openai.pagination import SyncPage
from openai.types import Completion, CompletionChoice, Model, completion_choice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject

from tests.support.recording import Exchange

# What the server sends beyond the types. The last two are OpenAI's own: its replies have them.
EXTRA_KEYS = {
    "ErrorObject.n_ctx",
    "ErrorObject.n_prompt_tokens",
    "Choice.stop_reason",
    "TextChoice.stop_reason",
    "TextChunkChoice.stop_reason",
    "ChatCompletionMessage.reasoning_content",
    "ChoiceDelta.reasoning_content",
    "ChatCompletion.timings",
    "ChatCompletionChunk.timings",
    "Model.max_model_len",
    # Anthropic's form, in the same bodies.
    *(f"SyncPage[Model].{name}" for name in ("has_more", "first_id", "last_id")),
    *(f"Model.{name}" for name in ("type", "display_name", "created_at", "lifecycle")),
    "Model.max_input_tokens",
    "Response.store",
    "ResponseFunctionCallArgumentsDoneEvent.name",
}


# The package's types of completions lack two nulls that OpenAI sends: the finish reason of chunks
# before the last, and the log-probability of an echoed prompt's first token.
class TextLogprobs(completion_choice.Logprobs):
    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class TextChoice(CompletionChoice):
    logprobs: TextLogprobs | None = None


class TextCompletion(Completion):
    choices: list[TextChoice]  # type: ignore[assignment]


class TextChunkChoice(TextChoice):
    finish_reason: Literal["stop", "length", "content_filter"] | None  # type: ignore[assignment]


class TextChunk(Completion):
    choices: list[TextChunkChoice]  # type: ignore[assignment]


class ErrorBody(pydantic.BaseModel, extra="forbid"):
    error: ErrorObject


@dataclass(frozen=True, slots=True)
class Types:
    """What a route answers."""

    whole: Any
    event: Any = None
    error: Any = ErrorBody


ROUTES = {
    "/v1/chat/completions": Types(ChatCompletion, ChatCompletionChunk),
    "/v1/completions": Types(TextCompletion, TextChunk),
    "/v1/responses": Types(Response, ResponseStreamEvent),
    "/v1/messages": Types(Message, RawMessageStreamEvent, ErrorResponse),
    "/v1/messages/count_tokens": Types(MessageTokensCount, error=ErrorResponse),
    "/v1/models": Types(SyncPage[Model]),
    "/v1/models/.+": Types(Model),
}


def check_exchange(exchange: Exchange) -> None:
    """Raise unless every JSON value of the reply fits its type and comes back from it as it was."""
    types = next(types for path, types in ROUTES.items() if re.fullmatch(path, exchange.path))
    if exchange.status != 200:
        check_value(json.loads(exchange.body), types.error)
    elif not exchange.streamed:
        check_value(json.loads(exchange.body), types.whole)
    else:
        for event in exchange.events():
            if event != "[DONE]":
                check_value(json.loads(event), types.event)


@functools.cache
def adapter_of(expected: Any) -> pydantic.TypeAdapter[Any]:
    """Made once: for the events of a response that takes 0.15 s."""
    return pydantic.TypeAdapter(expected)


def check_value(value: Any, expected: Any) -> None:
    adapter = adapter_of(expected)
    parsed = adapter.validate_python(value, strict=True)
    dumped = adapter.dump_python(parsed, mode="json", by_alias=True, exclude_unset=True)
    assert dumped == value
    unknown = set(extra_keys(parsed)) - EXTRA_KEYS
    assert not unknown, f"keys that no type and no list knows: {sorted(unknown)}"


def extra_keys(value: object) -> Iterator[str]:
    """`Type.key` of every key that the types do not have, at any depth."""
    if isinstance(value, pydantic.BaseModel):
        for key in value.model_extra or {}:
            yield f"{type(value).__name__}.{key}"
        for field in type(value).model_fields:
            yield from extra_keys(getattr(value, field))
    elif isinstance(value, list):
        for part in value:
            yield from extra_keys(part)
