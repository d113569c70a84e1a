"""From the deltas of an assistant's message to content blocks, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from minisrv.frontend.generation.assistant_message import Delta

StreamEvent = dict[str, Any]

# Clients hand reasoning back with it, or drop those without one; it is not read here.
SIGNATURE = "minisrv"
# Where a call's arguments are no JSON object, they stand under this name as the model wrote them.
INVALID_JSON = "INVALID_JSON"

_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class ContentBlocks:
    """One message's blocks as events: each block begins when the one before it has ended."""

    def __init__(self, *, show_reasoning: bool = True) -> None:
        """Without `show_reasoning` reasoning is a block without text."""
        self._show_reasoning = show_reasoning
        self._index = -1
        self._open: str | None = None

    def add(self, delta: Delta) -> list[StreamEvent]:
        """What a delta adds."""
        if "tool_calls" in delta:
            (call,) = delta["tool_calls"]
            function = call["function"]
            if "id" in call:
                return self._begin(_tool_use(call["id"], function["name"]))
            return [self._delta("input_json_delta", "partial_json", function["arguments"])]
        if "content" in delta:
            return [*self._ensure("text"), self._delta("text_delta", "text", delta["content"])]
        events = self._ensure("thinking")
        if self._show_reasoning:
            reasoning = delta["reasoning_content"]
            events.append(self._delta("thinking_delta", "thinking", reasoning))
        return events

    def end(self) -> list[StreamEvent]:
        """The end of the last block."""
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
        events = self.end()
        self._index += 1
        self._open = block["type"]
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*events, start]

    def _delta(self, kind: str, name: str, value: str) -> StreamEvent:
        delta = {"type": kind, name: value}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def join(events: Iterable[StreamEvent]) -> list[dict[str, Any]]:
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


def _tool_use(id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": {}}


def _read_input(arguments: str) -> dict[str, Any]:
    """Arguments that were cut off are read as far as they go, as clients read a stream's."""
    try:
        value = from_json(arguments, allow_partial=True, allow_inf_nan=False) if arguments else {}
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}
