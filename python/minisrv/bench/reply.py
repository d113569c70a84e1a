"""Reads the stream of one reply: when output arrived, how much there was, and how it ended.

Works on bytes and times, without I/O. One event of the stream is one line `data: {...}`, as all
servers with OpenAI's API write it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jiter import from_json

_MAX_ERROR_BYTES = 2**16
# In the deltas of /v1/chat/completions. OpenAI has no field for reasoning; servers use either.
_OUTPUT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed. kind: the same words for the same cause, so that it can be counted."""

    kind: str
    message: str = ""


class Reply:
    """The reply to one request as far as it has arrived.

    chunk_times: the arrival of each chunk with output, in the seconds of the caller's clock.
    text, token_ids: of the output, if they are kept.
    finish_reason: None until the server has sent it.
    done: whether the stream came to its end.
    """

    def __init__(self, keep_output: bool = False) -> None:
        self.chunk_times: array[float] = array("d")
        self.usage: Mapping[str, Any] = {}
        self.finish_reason: str | None = None
        self.failure: Failure | None = None
        self.done = False
        self.text = ""
        self.token_ids: list[int] = []
        self._keep_output = keep_output
        self._status = 0
        self._rest = b""

    def begin(self, status: int) -> None:
        """The head of the response has arrived."""
        self._status = status

    def feed(self, data: bytes, now: float) -> None:
        """A part of the body arrived at `now`."""
        if self._rest:
            data = self._rest + data
        if self._status != 200:
            self._rest = data[:_MAX_ERROR_BYTES]
            return
        lines = data.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:].strip(), now)

    def end(self) -> Failure | None:
        """Nothing more will arrive. Returns why the request failed, or None."""
        if self.failure is not None:
            return self.failure
        if not self._status:
            return Failure("connection closed before the reply")
        if self._status != 200:
            return Failure(f"status {self._status}", self._error_text())
        if self.done and self.chunk_times:
            return None
        if self.done:
            return Failure("reply without output")
        if self.chunk_times:
            return Failure("reply broken off")
        return Failure("reply is not a stream of events", self._error_text())

    def _read_event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = from_json(data)
        except ValueError as error:
            self.failure = self.failure or Failure("event is not JSON", str(error))
            return
        if not isinstance(event, dict) or event.get("error"):
            self.failure = self.failure or Failure("error in the stream", error_text(event))
            return
        if isinstance(usage := event.get("usage"), dict):
            self.usage = usage
        if not (choices := event.get("choices")):
            return
        choice = choices[0]
        if reason := choice.get("finish_reason"):
            self.finish_reason = reason
        delta = choice.get("delta")
        if choice.get("text") or (delta and any(map(delta.get, _OUTPUT_FIELDS))):
            self.chunk_times.append(now)
        if self._keep_output:
            self.text += choice.get("text") or (delta or {}).get("content") or ""
            self.token_ids += choice.get("token_ids") or ()

    def _error_text(self) -> str:
        try:
            return error_text(from_json(self._rest))
        except ValueError:
            return self._rest[:200].decode("utf-8", "replace")


def error_text(body: Any) -> str:
    """The message of an error object in OpenAI's or a simpler form."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return message if isinstance(message, str) else str(message)
