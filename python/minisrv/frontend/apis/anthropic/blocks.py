"""Writes the pieces of a reply as content blocks, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from minisrv.frontend.generation.pieces import (
    Finish,
    Piece,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)

StreamEvent = dict[str, Any]

# Clients send reasoning back with its signature, and drop blocks without one; it is not checked.
SIGNATURE = "minisrv"
# Arguments that are not a JSON object stand under this name, as the model wrote them.
INVALID_JSON = "INVALID_JSON"

_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class ContentBlocks:
    """The blocks of one message, as events: each block starts when the one before has ended."""

    def __init__(self, *, show_reasoning: bool = True) -> None:
        """Without `show_reasoning`, reasoning is a block without text."""
        self._show_reasoning = show_reasoning
        self._index = -1
        self._open: str | None = None

    def events(self, piece: Piece) -> list[StreamEvent]:
        """The events of a piece."""
        match piece:
            case Text(text):
                return [*self._ensure("text"), self._delta("text_delta", "text", text)]
            case Reasoning(text):
                events = self._ensure("thinking")
                if self._show_reasoning:
                    events.append(self._delta("thinking_delta", "thinking", text))
                return events
            case ToolCallStart(_, id, name):
                return self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
            case ToolCallArguments(_, text):
                return [self._delta("input_json_delta", "partial_json", text)]
            case Finish():
                return self._end()

    def _end(self) -> list[StreamEvent]:
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            events.append(self._delta("signature_delta", "signature", SIGNATURE))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _ensure(self, kind: str) -> list[StreamEvent]:
        return [] if self._open == kind else self._begin(dict(_EMPTY[kind]))

    def _begin(self, block: dict[str, Any]) -> list[StreamEvent]:
        events = self._end()
        self._index += 1
        self._open = block["type"]
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*events, start]

    def _delta(self, kind: str, name: str, value: str) -> StreamEvent:
        delta = {"type": kind, name: value}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def join_blocks(events: Iterable[StreamEvent]) -> list[dict[str, Any]]:
    """The blocks of a whole reply, from the events of its stream."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                blocks.append(event["content_block"])
                arguments = ""
            case "content_block_delta":
                for name, value in event["delta"].items():
                    if name == "partial_json":
                        arguments += value
                    elif name != "type":
                        blocks[-1][name] += value
            case "content_block_stop" if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = _read_input(arguments)
    return blocks


def _read_input(arguments: str) -> dict[str, Any]:
    """Arguments that were cut off are read as far as they go, as clients read those of a stream."""
    try:
        value = from_json(arguments, allow_partial=True, allow_inf_nan=False) if arguments else {}
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}
