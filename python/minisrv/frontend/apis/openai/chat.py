"""POST /v1/chat/completions: reads a chat's fields, and writes its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.fields import Fields, read_generation
from minisrv.frontend.apis.openai.logprobs import chat_logprobs
from minisrv.frontend.apis.openai.messages import read_messages
from minisrv.frontend.apis.openai.render import NO_OPTIONS, OpenAIRenderer
from minisrv.frontend.fields.schema import check_value, object_of
from minisrv.frontend.fields.template import (
    begins_new_turn,
    check_no_template,
    effort_warnings,
    read_template_kwargs,
    reasoning_variables,
)
from minisrv.frontend.fields.tools import ToolUse, check_is_function, read_choice, read_tools
from minisrv.frontend.generation.pieces import (
    Finish,
    Piece,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)
from minisrv.frontend.generation.request import (
    ChatPrompt,
    ChatRequest,
    GenerationRequest,
    TextRequest,
    read_prompt_ids,
)
from minisrv.frontend.http.sse import encode_json
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.wire.events import Event
from minisrv.wire.logprobs import SpelledLogprobs

CHAT_PREFIX = "chatcmpl-"
_WITH_FUNCTION = object_of(["function"])


def read_chat(fields: Fields, model: ModelInfo) -> ChatRequest | TextRequest:
    """Read a chat completion, whose prompt may be given as is. Raises InvalidRequestError."""
    max_tokens = fields.get("max_completion_tokens", fields.get("max_tokens"))
    logprobs = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    if logprobs is None and fields.get("top_logprobs"):
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    common = read_generation(fields, model, max_tokens=max_tokens, logprobs=logprobs)
    prompt = read_chat_prompt(fields, model)
    if "prompt" not in fields:
        effort = fields.get("reasoning_effort")
        warnings = effort_warnings(effort, model.chat_format, "reasoning_effort")
        return ChatRequest(prompt=prompt, warnings=warnings, **common)
    check_no_template(fields)
    text = fields["prompt"]
    ids_or_text = text
    if not isinstance(text, str):
        ids_or_text = read_prompt_ids(text, model, "prompt", max_tokens)
    return TextRequest(prompts=(ids_or_text,), **common)


def read_chat_prompt(fields: Fields, model: ModelInfo) -> ChatPrompt:
    """Read the conversation and its template. Raises InvalidRequestError."""
    variables = reasoning_variables(
        fields.get("reasoning_effort"), fields.get("enable_thinking"), model.chat_format
    )
    own = read_template_kwargs(fields.get("chat_template_kwargs", {}))
    tools = _read_tools(fields, model)
    continues = fields.get("continue_final_message", False)
    return ChatPrompt(
        messages=() if "prompt" in fields else read_messages(fields.get("messages")),
        tools=tools,
        template_kwargs={**model.template_kwargs, **variables, **own},
        template=fields.get("chat_template"),
        begins_turn=begins_new_turn(fields.get("add_generation_prompt"), continues),
        continues_last=continues,
    )


def _read_tools(fields: Fields, model: ModelInfo) -> ToolUse | None:
    tools = fields.get("tools", [])
    for i, tool in enumerate(tools):
        check_is_function(tool, f"tools.{i}")
        check_value(tool, _WITH_FUNCTION, f"tools.{i}")
    choice = read_choice(fields.get("tool_choice", "auto"), nested=True)
    return read_tools(tools, choice, fields.get("parallel_tool_calls", True), model.chat_format)


class ChatRenderer(OpenAIRenderer):
    """The order of a stream: for each choice by index a chunk with the role, since clients number
    choices as they first appear; for each choice chunks with reasoning, text and tool calls, then
    one with the finish reason; the usage, if requested; [DONE].
    """

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    text_frame = ('"delta":{"content":', "}")
    delta_name = "delta"
    prompt_at_top = True

    def __init__(
        self,
        request_id: str,
        system_fingerprint: str,
        request: GenerationRequest,
        reasoning_fields: Sequence[str],
        stream_options: Mapping[str, bool | None] = NO_OPTIONS,
    ) -> None:
        """reasoning_fields: the names under which a reply holds its reasoning."""
        super().__init__(CHAT_PREFIX + request_id, system_fingerprint, request, stream_options)
        self._reasoning_fields = reasoning_fields
        self._opened = False
        self._not_empty: set[int] = set()
        self._held_logprobs: dict[int, list[SpelledLogprobs]] = {}

    def _content(self, event: Event, pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = chat_logprobs(event.logprobs) if event.logprobs else None
        return {"message": self._message(pieces), "logprobs": logprobs}

    def _message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content, reasoning, calls = "", "", list[dict[str, Any]]()
        for piece in pieces:
            match piece:
                case Text(text):
                    content += text
                case Reasoning(text):
                    reasoning += text
                case ToolCallStart(_, id, name):
                    calls.append(_call(id, name))
                case ToolCallArguments(_, text):
                    calls[-1]["function"]["arguments"] += text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message |= dict.fromkeys(self._reasoning_fields, reasoning)
        if calls:
            message["tool_calls"] = calls
        if not content and len(message) > len(("role", "content", "refusal")):
            message["content"] = None
        return message

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        if event.start is not None:
            self._keep_prompt(event)
        chunks = [] if self._opened else self._open_choices()
        if event.progress is not None:
            chunks.append(self._chunk(event.index, {}, progress=event.progress))
        if self._shows_ids:
            self._token_ids[event.index] += event.token_ids
        logprobs = event.logprobs
        if event.index in self._held_logprobs:
            logprobs = self._held_logprobs.pop(event.index) + logprobs
        for piece in pieces:
            if type(piece) is Text and not logprobs and self._plain_text:
                self._not_empty.add(event.index)
                before, after = self._frames[event.index]
                chunks.append(before + encode_json(piece.text).encode() + after)
                continue
            chunks.append(self._piece_chunk(event.index, piece, logprobs))
            logprobs = []
        if logprobs:  # no piece carries them: their text is held back
            self._held_logprobs[event.index] = logprobs
        return b"".join(chunks)

    def _open_choices(self) -> list[bytes]:
        self._opened = True
        # As at OpenAI: clients join deltas, and a message with tool calls has no content.
        content = "" if self._request.calls is None else None
        delta = {"role": "assistant", "content": content}
        return [self._chunk(index, delta) for index in range(self._request.num_choices)]

    def _piece_chunk(self, index: int, piece: Piece, logprobs: list[SpelledLogprobs]) -> bytes:
        written = chat_logprobs(logprobs) if logprobs else None
        if not isinstance(piece, Finish):
            self._not_empty.add(index)
            return self._chunk(index, self._delta(piece), logprobs=written)
        chunk = b""
        if self._request.calls is not None and index not in self._not_empty:
            # The first chunk had no content, as calls could follow; now the content is empty.
            chunk, written = self._chunk(index, {"content": ""}, logprobs=written), None
        return chunk + self._chunk(index, {}, finish=piece, logprobs=written)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        match piece:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return dict.fromkeys(self._reasoning_fields, text)
            case ToolCallStart(index, id, name):
                return {"tool_calls": [{"index": index, **_call(id, name)}]}
            case ToolCallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case Finish():
                return {}


def _call(id: str, name: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
