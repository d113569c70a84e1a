"""What chat completions and completions share: the frame of a reply, whole or in chunks."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from minisrv.frontend.generation.event_reader import Usage
from minisrv.frontend.generation.pieces import Finish, Piece, finish_of
from minisrv.frontend.generation.renderer import Choice, Renderer
from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.http.sse import DONE, encode_json, sse
from minisrv.wire.events import Event
from minisrv.wire.messages import PrefillProgress, ShownPrompt

NO_OPTIONS: Mapping[str, bool | None] = {}


class OpenAIRenderer(Renderer):
    """The part of a Renderer that both shapes share; each names its objects and its text.

    Token ids and prompts, for requests that ask for them, stand where vLLM has them: `token_ids` in
    each choice; `prompt_token_ids` once per prompt, at the top of a chat's reply or first chunk,
    and in the first choice of each prompt of a completion. `prompt`, the text, stands next to it.
    They are kept until the next chunk of their choice, since an event may give none.
    """

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    # In a chunk's choice: what stands before and after the JSON string of its text.
    text_frame: ClassVar[tuple[str, str]]
    delta_name: ClassVar[str]
    # Where `prompt` and `prompt_token_ids` stand.
    prompt_at_top: ClassVar[bool]

    def __init__(
        self,
        id: str,
        system_fingerprint: str,
        request: GenerationRequest,
        stream_options: Mapping[str, bool | None],
    ) -> None:
        super().__init__(request.sampling.n)
        self._id = id
        self._request = request
        self._system_fingerprint = system_fingerprint
        self._created = int(time.time())
        self._usage_at_end = bool(stream_options.get("include_usage"))
        self._usage_in_chunks = bool(stream_options.get("continuous_usage_stats"))
        # Whether chunks of text differ in their text only.
        self._shows_ids = request.reply.token_ids
        shows_tokens = self._shows_ids or request.reply.prompt_text
        self._plain_text = not self._usage_in_chunks and not shows_tokens
        self._frames = _Frames(self._make_frame)
        self._prompts: dict[int, ShownPrompt] = {}
        self._token_ids: dict[int, list[int]] = defaultdict(list)

    @abstractmethod
    def _content(self, event: Event, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What a whole reply's choice holds: text or message, and logprobs."""

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        reply = self._reply(self.whole_object)
        for event, pieces in choices:
            self._keep_prompt(event)
            if self._shows_ids:
                self._token_ids[event.index] += event.token_ids
            content = self._content(event, pieces)
            choice = {"index": event.index, **content, **_ending(finish_of(pieces))}
            self._write_tokens(event.index, choice, reply)
            reply["choices"].append(choice)
        reply["usage"] = _usage_body(self.usage)
        return reply if timings is None else {**reply, "timings": timings}

    def end(self, timings: dict[str, Any] | None) -> bytes:
        """Timings and usage, if requested, each in a chunk without choices."""
        data = b""
        if timings is not None:
            data += sse(self._with_usage(self._reply(self.chunk_object) | {"timings": timings}))
        if self._usage_at_end:
            data += sse(self._reply(self.chunk_object) | {"usage": _usage_body(self.usage)})
        return data + DONE

    def _reply(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": self._system_fingerprint,
            "choices": [],
        }

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        if self._usage_in_chunks:
            chunk["usage"] = _usage_body(self.usage)
        elif self._usage_at_end:
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
        choice = {"index": index, self.delta_name: delta, "logprobs": logprobs, **_ending(finish)}
        chunk = self._reply(self.chunk_object)
        chunk["choices"].append(choice)
        if progress is not None:
            chunk["prompt_progress"] = _progress_body(progress)
        self._write_tokens(index, choice, chunk)
        return sse(self._with_usage(chunk))

    def _make_frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON string in a plain chunk of text."""
        head = encode_json(self._reply(self.chunk_object)).removesuffix("]}")
        before, after = self.text_frame
        usage = ',"usage":null' if self._usage_at_end else ""
        start = f'data: {head}{{"index":{index},{before}'
        end = f'{after},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'
        return start.encode(), end.encode()

    def _keep_prompt(self, event: Event) -> None:
        if event.start is not None and event.start.shown_prompt is not None:
            self._prompts[event.index] = event.start.shown_prompt

    def _write_tokens(self, index: int, choice: dict[str, Any], reply: dict[str, Any]) -> None:
        """Move what was kept for a choice into it, or into the reply around it."""
        prompt = self._prompts.pop(index, None)
        if prompt is not None:
            place = reply if self.prompt_at_top else choice
            if prompt.ids is not None:
                place["prompt_token_ids"] = prompt.ids.tolist()
            if prompt.text is not None:
                place["prompt"] = prompt.text
        if self._shows_ids:
            choice["token_ids"] = self._token_ids.pop(index, [])


class _Frames(dict[int, tuple[bytes, bytes]]):
    """By choice; made once, since most chunks differ in their text only."""

    def __init__(self, make: Callable[[int], tuple[bytes, bytes]]) -> None:
        self._make = make

    def __missing__(self, index: int) -> tuple[bytes, bytes]:
        frame = self[index] = self._make(index)
        return frame


def _ending(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None}
    return {"finish_reason": finish.reason, "stop_reason": finish.stop_reason}


def _usage_body(usage: Usage) -> dict[str, Any]:
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
