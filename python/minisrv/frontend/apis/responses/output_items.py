"""The output of a response while it comes in: items, one after the other, and their events."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from minisrv.frontend.generation.assistant_message import Delta

StreamEvent = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call"]

_ID_PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_TEXT_EVENTS: dict[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


class OutputItems:
    """Turns a message's deltas into items. `ended` are those that nothing can be added to."""

    def __init__(self) -> None:
        self.ended: list[dict[str, Any]] = []
        self._open: _Item | None = None

    @property
    def in_call(self) -> bool:
        """Whether the last item is a call."""
        return self._open is not None and self._open.kind == "function_call"

    def add(self, delta: Delta) -> list[StreamEvent]:
        """The events of a delta of an AssistantMessage."""
        if "tool_calls" not in delta:
            kind: Kind = "message" if "content" in delta else "reasoning"
            (text,) = delta.values()
            events = [] if self._open and self._open.kind == kind else self._begin(kind)
            return [*events, self._push(text)]
        (call,) = delta["tool_calls"]
        events = []
        if "id" in call:
            call_fields = {"call_id": call["id"], "name": call["function"]["name"]}
            events = self._begin("function_call", call_fields)
        text = call["function"]["arguments"]
        return [*events, self._push(text)] if text else events

    def end(self, status: str) -> list[StreamEvent]:
        """The events of the end; the last item gets `status`. An empty reply is an empty text."""
        events = [] if self.ended or self._open else self._begin("message")
        return events + self._end(status)

    def _begin(self, kind: Kind, call: dict[str, str] | None = None) -> list[StreamEvent]:
        events = self._end("completed")
        self._open = _Item(kind, len(self.ended), call or {})
        return events + self._open.begin()

    def _push(self, text: str) -> StreamEvent:
        assert self._open is not None
        return self._open.push(text)

    def _end(self, status: str) -> list[StreamEvent]:
        if self._open is None:
            return []
        events = self._open.end(status)
        self.ended.append(self._open.body(status))
        self._open = None
        return events


class _Item:
    """One item. `call`: its call_id and name, for a function_call."""

    def __init__(self, kind: Kind, index: int, call: dict[str, str]) -> None:
        self.kind = kind
        self._call = call
        self._pieces: list[str] = []
        self._id = f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
        self._place: dict[str, Any] = {"item_id": self._id, "output_index": index}
        if kind != "function_call":
            self._place["content_index"] = 0

    def begin(self) -> list[StreamEvent]:
        added = self._item_event("added", self.body("in_progress"))
        return [added] if self._is_call else [added, self._part_event("added")]

    def push(self, text: str) -> StreamEvent:
        self._pieces.append(text)
        return self._text_event("delta", {"delta": text})

    def end(self, status: str) -> list[StreamEvent]:
        item_done = self._item_event("done", self.body(status))
        if self._is_call:
            arguments = {"name": self._call["name"], "arguments": self._text}
            return [self._text_event("done", arguments), item_done]
        text_done = self._text_event("done", {"text": self._text})
        return [text_done, self._part_event("done"), item_done]

    def body(self, status: str) -> dict[str, Any]:
        """The item; its content is empty before it has begun."""
        head = {"id": self._id, "type": self.kind, "status": status}
        if self._is_call:
            return {**head, **self._call, "arguments": self._text}
        content = [] if status == "in_progress" else [self._part()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    @property
    def _is_call(self) -> bool:
        return self.kind == "function_call"

    @property
    def _text(self) -> str:
        return "".join(self._pieces)

    def _part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self._text}
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _item_event(self, name: str, item: dict[str, Any]) -> StreamEvent:
        index = self._place["output_index"]
        return {"type": f"response.output_item.{name}", "output_index": index, "item": item}

    def _part_event(self, name: str) -> StreamEvent:
        return {"type": f"response.content_part.{name}", **self._place, "part": self._part()}

    def _text_event(self, name: str, fields: dict[str, Any]) -> StreamEvent:
        event = {"type": f"{_TEXT_EVENTS[self.kind]}.{name}", **self._place, **fields}
        return {**event, "logprobs": []} if self.kind == "message" else event
