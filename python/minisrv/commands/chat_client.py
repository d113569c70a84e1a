"""A client of `/v1/chat/completions`, for any server that speaks OpenAI's API."""

from __future__ import annotations

import json
import time
import urllib.error
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, Literal
from urllib.parse import urlsplit

from minisrv.errors import MinisrvError
from minisrv.option_values import authorization, read_server_url
from minisrv.server_request import UnreachableError, send_request

_MODELS_TIMEOUT_S, _ANSWER_TIMEOUT_S = 30, 600

Message = dict[str, str]


class ChatError(MinisrvError):
    """The server cannot be reached, refuses, or breaks off."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of an answer or of the reasoning before it."""

    kind: Literal["answer", "reasoning"]
    text: str


@dataclass(slots=True)
class Answer:
    """What has arrived. Seconds count from the request; usage is empty until the end."""

    text: str = ""
    finish_reason: str | None = None
    first_s: float | None = None
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """One line of figures."""
        parts = []
        if self.first_s is not None:
            parts.append(f"first token after {self.first_s:.2f} s")
        if (output := self.usage.get("completion_tokens")) is not None:
            parts.insert(0, f"{output} tokens")
            decode_s = self.total_s - (self.first_s or 0.0)
            if output > 1 and decode_s > 0:
                parts.append(f"then {(output - 1) / decode_s:.1f} tokens/s")
        if (prompt := self.usage.get("prompt_tokens")) is not None:
            parts.append(f"{self.cached_tokens} of {prompt} prompt tokens cached")
        if self.finish_reason == "length":
            parts.append("cut off by a limit of tokens")
        return ", ".join(parts)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


class ChatClient:
    """url: of the server, with or without its /v1. model: empty for the first that it serves.

    Raises ConfigError for a URL or key that cannot be used, ChatError.
    """

    def __init__(self, url: str, api_key: str = "", model: str = "") -> None:
        url = read_server_url(url)
        self.url = url if urlsplit(url).path else f"{url}/v1"
        self._headers = {"User-Agent": "minisrv-chat", **authorization(api_key)}
        self.model = model or self._first_model()

    def stream(
        self, messages: Sequence[Message], settings: Mapping[str, Any], answer: Answer
    ) -> Generator[Delta]:
        """Ask, and update `answer` while its deltas arrive. Raises ChatError."""
        body = {"model": self.model, "messages": list(messages), "stream": True}
        body |= {"stream_options": {"include_usage": True}, **settings}
        started = time.monotonic()
        try:
            with self._open("/chat/completions", body, _ANSWER_TIMEOUT_S) as response:
                for chunk in _events(response):
                    answer.usage = chunk.get("usage") or answer.usage
                    for choice in (chunk.get("choices") or [])[:1]:
                        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                        for delta in _deltas(choice.get("delta") or {}):
                            if answer.first_s is None:
                                answer.first_s = time.monotonic() - started
                            if delta.kind == "answer":
                                answer.text += delta.text
                            yield delta
        finally:
            answer.total_s = time.monotonic() - started

    def _first_model(self) -> str:
        with self._open("/models", None, _MODELS_TIMEOUT_S) as response:
            try:
                return str(json.load(response)["data"][0]["id"])
            except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError):
                raise ChatError(f"{self.url}/models names no model; give one: --model") from None

    def _open(self, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> HTTPResponse:
        try:
            return send_request(self.url + path, self._headers, body, timeout_s=timeout_s)
        except urllib.error.HTTPError as error:
            raise ChatError(_explain(self.url + path, error)) from None
        except UnreachableError as error:
            raise ChatError(f"no server answers at {self.url}: {error.message}") from None


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream, up to its end. Raises ChatError for an error among them."""
    try:
        for line in response:
            name, _, data = line.decode("utf-8", "replace").partition(":")
            if name != "data" or not data.strip():
                continue
            if data.strip() == "[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict) or event.get("error"):
                raise ChatError(_message(event) or "the server broke off the answer")
            yield event
    except (OSError, HTTPException, ValueError, TypeError, RecursionError) as error:
        raise ChatError(f"the answer broke off: {error}") from None
    raise ChatError("the answer broke off: the server closed the connection")


def _deltas(delta: Mapping[str, Any]) -> Iterator[Delta]:
    """OpenAI has no field for reasoning; servers call it either."""
    if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
        yield Delta("reasoning", reasoning)
    if text := delta.get("content"):
        yield Delta("answer", text)


def _explain(url: str, error: urllib.error.HTTPError) -> str:
    """A refusal in the server's own words, with what can be done about it."""
    try:
        said = _message(json.loads(error.read()))
    except (OSError, HTTPException, ValueError, RecursionError):
        said = ""
    text = f"{url} answers with status {error.code}{f': {said}' if said else ''}"
    if error.code == 401:
        text += " (give a key: --api-key, or set OPENAI_API_KEY)"
    return text


def _message(body: Any) -> str:
    """Of an error object in OpenAI's or a simpler form."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
