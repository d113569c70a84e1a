"""From events to OpenAI's replies: server-sent chunks, or one whole object.

The order on the wire: a chunk with the role for each choice by index (chat), since clients number
the choices of a stream as they first come; for each choice, chunks with reasoning, text and tool
calls, then an empty chunk with the finish reason; if asked for, one chunk with the usage; then
[DONE].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from minisrv.frontend.generation.assistant_message import AssistantMessage, CallReading
from minisrv.frontend.generation.completion_text import CompletionTexts
from minisrv.frontend.generation.logprobs import chat_logprobs, text_logprobs
from minisrv.frontend.generation.returned_tokens import Returned, ReturnedTokens
from minisrv.frontend.registry.events import Event
from minisrv.wire.logprobs import SpelledLogprobs
from minisrv.wire.messages import Finish, Progress

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

FINISH_REASONS = {
    Finish.STOP: "stop",
    Finish.STOP_TOKEN: "stop",
    Finish.COMPLETE: "stop",
    Finish.LENGTH: "length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """include_usage: a last chunk with the usage. continuous_usage: the usage so far in each.

    progress: chunks that tell how far the prompt is.
    """

    include_usage: bool
    continuous_usage: bool
    progress: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHeader:
    """What all chunks of a reply share, and how its messages are read and written.

    echoed: prompts as they were sent, where they were text and are to stand before the output.
    """

    id: str
    chat: bool
    created: int
    model: str
    system_fingerprint: str
    choices_per_prompt: int
    calls: CallReading | None = None
    reasoning_fields: tuple[str, ...] = ("reasoning_content",)
    echoed: tuple[str | None, ...] = ()
    returned: Returned | None = None

    def reply(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk or a whole reply, without usage."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }

    def message(self) -> AssistantMessage:
        """A new choice's message."""
        return AssistantMessage(self.calls, self.reasoning_fields)

    def completion_texts(self) -> CompletionTexts:
        """For the texts of a new reply to a completion."""
        return CompletionTexts(self.echoed, self.choices_per_prompt)

    def returned_tokens(self) -> ReturnedTokens | None:
        """A new reply's ids and prompts, if it shows any."""
        return ReturnedTokens(self.returned, chat=self.chat) if self.returned else None


class Usage:
    """Counts a request's tokens: a prompt once, however many choices it has."""

    def __init__(self, header: ReplyHeader) -> None:
        self._header = header
        self._prompts: dict[int, tuple[int, int]] = {}
        self._outputs: dict[int, int] = {}
        self._reasoning: dict[int, int] = {}

    def add(self, event: Event) -> None:
        """Take over the counts of an event."""
        if event.start is not None and event.index % self._header.choices_per_prompt == 0:
            self._prompts[event.index] = (event.start.prompt_tokens, event.start.cached_tokens)
        if event.deltas:
            self._outputs[event.index] = event.output_tokens
        if event.reasoning_tokens:
            self._reasoning[event.index] = event.reasoning_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt for prompt, _ in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the cache held."""
        return sum(cached for _, cached in self._prompts.values())

    @property
    def output_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(self._outputs.values())

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that are reasoning."""
        return sum(self._reasoning.values())

    def body(self) -> dict[str, Any]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class StreamReply:
    """Turns events into the bytes of a stream."""

    def __init__(self, header: ReplyHeader, usage: Usage, options: StreamOptions) -> None:
        self._header = header
        self._usage = usage
        self._options = options
        self._object = "chat.completion.chunk" if header.chat else "text_completion"
        self._messages: list[AssistantMessage] = []
        self._held_logprobs: dict[int, list[SpelledLogprobs]] = {}
        self._empty = b'"content":""' if header.chat else b'"text":""'
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._tokens = header.returned_tokens()
        self._texts = header.completion_texts()

    def chunks(self, event: Event) -> bytes:
        """The chunks of one event without a failure."""
        self._usage.add(event)
        if self._tokens is not None:
            self._tokens.take_prompt(event)
        if not self._header.chat:
            return self._text_chunks(event)
        chunks = [] if self._messages else self._open_messages()
        message = self._messages[event.index]
        if event.progress is not None:
            chunks.append(self._progress_chunk(event.index, {}, event.progress))
        scores = self._held_logprobs.pop(event.index, []) + event.logprobs
        if self._tokens is not None:
            self._tokens.take_ids(event)
        for delta in message.deltas(event):
            text = delta.get("content")
            if text and not scores:
                chunks.append(self._text_chunk(event.index, text))
                continue
            logprobs = chat_logprobs(scores) if scores else None
            chunks.append(self._chunk(event.index, delta, logprobs=logprobs))
            scores = []
        if event.final:
            logprobs = chat_logprobs(scores) if scores else None
            chunks.append(self._chunk(event.index, {}, _ending(event, message), logprobs))
        elif scores:  # their text is held back
            self._held_logprobs[event.index] = scores
        return b"".join(chunks)

    def _open_messages(self) -> list[bytes]:
        indexes = range(self._header.choices_per_prompt)
        self._messages = [self._header.message() for _ in indexes]
        # As OpenAI has it: clients add up deltas, and a message of calls has no content.
        content = "" if self._header.calls is None else None
        return [self._chunk(index, {"role": "assistant", "content": content}) for index in indexes]

    def _text_chunks(self, event: Event) -> bytes:
        if self._tokens is not None:
            self._tokens.take_ids(event)
        (text, scores), chunk = self._texts.add(event), b""
        if event.progress is not None:
            chunk = self._progress_chunk(event.index, "", event.progress)
        if scores:
            chunk += self._chunk(event.index, text, logprobs=text_logprobs(scores))
        elif text:
            chunk += self._text_chunk(event.index, text)
        return chunk + self._chunk(event.index, "", _ending(event)) if event.final else chunk

    def end(self) -> bytes:
        """What follows the last choice."""
        if not self._options.include_usage:
            return DONE
        last = self._header.reply(self._object, [])
        return sse({**last, "usage": self._usage.body()}) + DONE

    def _text_chunk(self, index: int, text: str) -> bytes:
        """All but the text is the same in each such chunk of a choice: it is encoded once."""
        if self._options.continuous_usage or self._tokens is not None:
            return self._chunk(index, self._delta(text))
        frame = self._frames.get(index)
        if frame is None:
            before, mark, after = self._chunk(index, self._delta("")).partition(self._empty)
            frame = self._frames[index] = (before + mark[:-2], after)
        return frame[0] + _encode(text).encode() + frame[1]

    def _progress_chunk(self, index: int, delta: dict[str, Any] | str, progress: Progress) -> bytes:
        """llama.cpp's form; `processed` counts the cached tokens too."""
        figures = {
            "total": progress.total,
            "cache": progress.cached,
            "processed": progress.processed,
            "time_ms": round(progress.seconds * 1000),
        }
        return self._chunk(index, delta, more={"prompt_progress": figures})

    def _delta(self, text: str) -> dict[str, str] | str:
        return {"content": text} if self._header.chat else text

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any] | str,
        ending: dict[str, Any] | None = None,
        logprobs: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta" if self._header.chat else "text": delta,
            "logprobs": logprobs,
            "finish_reason": None,
        }
        if ending is not None:
            choice.update(ending)
        chunk = self._header.reply(self._object, [choice])
        if more is not None:
            chunk.update(more)
        if self._tokens is not None:
            self._tokens.put(index, choice, chunk)
        if self._options.continuous_usage:
            chunk["usage"] = self._usage.body()
        elif self._options.include_usage:
            chunk["usage"] = None
        return sse(chunk)


def whole_reply(header: ReplyHeader, events: list[Event], usage: Usage) -> dict[str, Any]:
    """The reply to a request without `stream`: each choice has had its final, none a failure."""
    choices: list[dict[str, Any]] = []
    reply = header.reply("chat.completion" if header.chat else "text_completion", choices)
    tokens, texts = header.returned_tokens(), header.completion_texts()
    for event in sorted(events, key=lambda event: event.index):
        usage.add(event)
        choice: dict[str, Any] = {"index": event.index}
        message, logprobs = None, None
        if header.chat:
            message = header.message()
            choice["message"] = message.whole(event)
            logprobs = chat_logprobs(event.logprobs) if event.logprobs else None
        else:
            choice["text"], scores = texts.add(event)
            logprobs = text_logprobs(scores) if scores else None
        choice |= {"logprobs": logprobs, **_ending(event, message)}
        if tokens is not None:
            tokens.take_prompt(event)
            tokens.take_ids(event)
            tokens.put(event.index, choice, reply)
        choices.append(choice)
    return {**reply, "usage": usage.body()}


def sse(value: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + json_bytes(value) + b"\n\n"


def json_bytes(value: dict[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return _encode(value).encode()


# One encoder for all chunks: json.dumps with options would build one a call.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _ending(event: Event, message: AssistantMessage | None = None) -> dict[str, Any]:
    calls_tools = message is not None and message.calls_tools(event)
    return {
        "finish_reason": "tool_calls" if calls_tools else FINISH_REASONS[event.finish],
        "stop_reason": event.stop_reason,
    }
