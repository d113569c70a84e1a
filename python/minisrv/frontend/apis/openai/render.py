"""What chat completions and completions share: the frame of a reply, whole or in chunks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from minisrv.errors import MinisrvError
from minisrv.frontend.apis.openai.returned_tokens import ReturnedTokens
from minisrv.frontend.generation.pieces import Finish
from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.generation.usage import Usage
from minisrv.frontend.http.error_format import error_body
from minisrv.frontend.http.sse import DONE, PING, encode_json, sse
from minisrv.wire.messages import PrefillProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyHead:
    """What all chunks of a reply repeat. created: Unix seconds."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """include_usage: a last chunk holds the usage. continuous_usage: each chunk holds it so far."""

    include_usage: bool = False
    continuous_usage: bool = False


class OpenAIRenderer:
    """The part of a Renderer that both shapes share; each names its objects and its text."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    # Of a chunk's choice: what stands before and after the JSON string of its text.
    text_frame: ClassVar[tuple[str, str]]
    delta_name: ClassVar[str]
    # Where `prompt` and `prompt_token_ids` stand.
    prompt_at_top: ClassVar[bool]

    def __init__(self, head: ReplyHead, request: GenerationRequest, options: StreamOptions) -> None:
        self.usage = Usage(request.sampling.n)
        self._head = head
        self._request = request
        self._options = options
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._tokens = ReturnedTokens.of(request, at_top=self.prompt_at_top)

    def end(self, timings: dict[str, Any] | None) -> bytes:
        """Timings and usage, if requested, each in a chunk without choices."""
        data = b""
        if timings is not None:
            data += sse(self._with_usage(self._reply(self.chunk_object, []) | {"timings": timings}))
        if self._options.include_usage:
            chunk = self._reply(self.chunk_object, [])
            data += sse({**chunk, "usage": usage_body(self.usage)})
        return data + DONE

    def failed(self, error: MinisrvError) -> bytes:
        """An error object in place of a chunk."""
        return sse(error_body(error)) + DONE

    def ping(self) -> bytes:
        """A comment."""
        return PING

    def _reply(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "object": object_name,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
            "choices": choices,
        }

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        if self._options.continuous_usage:
            chunk["usage"] = usage_body(self.usage)
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any] | str,
        *,
        finish: Finish | None = None,
        logprobs: dict[str, Any] | None = None,
        progress: PrefillProgress | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            self.delta_name: delta,
            "logprobs": logprobs,
            "finish_reason": None,
        }
        if finish is not None:
            choice |= ending(finish)
        chunk = self._reply(self.chunk_object, [choice])
        if progress is not None:
            chunk["prompt_progress"] = _progress_body(progress)
        if self._tokens is not None:
            self._tokens.write(index, choice, chunk)
        return sse(self._with_usage(chunk))

    def _text_chunk(self, index: int, text: str) -> bytes:
        """A chunk that differs from the others of its choice in its text only.

        What stands around the text is encoded once per choice.
        """
        frame = self._frames.get(index)
        if frame is None:
            frame = self._frames[index] = self._make_frame(index)
        return frame[0] + encode_json(text).encode() + frame[1]

    @property
    def _plain_text(self) -> bool:
        """Whether chunks of text have nothing that changes but the text."""
        return not self._options.continuous_usage and self._tokens is None

    def _make_frame(self, index: int) -> tuple[bytes, bytes]:
        head = encode_json(self._reply(self.chunk_object, [])).removesuffix("]}")
        before, after = self.text_frame
        usage = ',"usage":null' if self._options.include_usage else ""
        start = f'data: {head}{{"index":{index},{before}'
        end = f'{after},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        return start.encode(), end.encode()

    def _whole(
        self, choices: list[dict[str, Any]], timings: dict[str, Any] | None
    ) -> dict[str, Any]:
        reply = self._reply(self.whole_object, choices)
        if self._tokens is not None:
            for choice in choices:
                self._tokens.write(choice["index"], choice, reply)
        reply["usage"] = usage_body(self.usage)
        return reply if timings is None else {**reply, "timings": timings}


def ending(finish: Finish) -> dict[str, Any]:
    """The end of a choice."""
    return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason}


def usage_body(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _progress_body(progress: PrefillProgress) -> dict[str, int]:
    """llama.cpp's form; `processed` includes the cached tokens."""
    return {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": round(progress.seconds * 1000),
    }
