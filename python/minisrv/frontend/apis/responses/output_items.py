"""Writes the pieces of a reply as output items, one after the other, and their events."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Literal

from minisrv.frontend.apis.responses.custom_input import CustomInput
from minisrv.frontend.apis.responses.tools import Callee
from minisrv.frontend.generation.pieces import (
    Finish,
    Piece,
    Reasoning,
    Text,
    ToolCallArguments,
    ToolCallStart,
)

StreamEvent = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call", "custom_tool_call"]

_ID_PREFIXES: dict[Kind, str] = {
    "reasoning": "rs",
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
}
_TEXT_EVENTS: dict[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
    "custom_tool_call": "response.custom_tool_call_input",
}
# Of calls: the property that holds what the model writes.
_CALL_TEXTS: dict[Kind, str] = {"function_call": "arguments", "custom_tool_call": "input"}


class OutputItems:
    """`ended`: the items that are complete."""

    def __init__(self, callee: Callable[[str], Callee]) -> None:
        """callee: what a name that the model calls stands for."""
        self._callee = callee
        self._input = CustomInput()
        self.ended: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def events(self, piece: Piece) -> list[StreamEvent]:
        """The events of a piece."""
        match piece:
            case Text(text):
                return self._extend("message", text)
            case Reasoning(text):
                return self._extend("reasoning", text)
            case ToolCallStart(_, id, name):
                return self._begin_call(id, self._callee(name))
            case ToolCallArguments(_, text):
                return self._extend_call(text)
            case Finish():
                return self._finish(piece)

    def _finish(self, finish: Finish) -> list[StreamEvent]:
        """End the last item. An empty reply is an empty text."""
        events = [] if self.ended or self._open else self._begin("message")
        in_call = self._open is not None and self._open.kind in _CALL_TEXTS
        cut = finish.in_call if in_call else finish.reason == "length"
        return events + self._end("incomplete" if cut else "completed")

    def _extend(self, kind: Kind, text: str) -> list[StreamEvent]:
        events = [] if self._open and self._open.kind == kind else self._begin(kind)
        assert self._open is not None
        return [*events, self._open.extend(text)]

    def _begin_call(self, id: str, callee: Callee) -> list[StreamEvent]:
        kind: Kind = "custom_tool_call" if callee.custom else "function_call"
        namespace = {"namespace": callee.namespace} if callee.namespace else {}
        events = self._begin(kind, {"call_id": id, "name": callee.name, **namespace})
        self._input = CustomInput()
        return events

    def _extend_call(self, arguments: str) -> list[StreamEvent]:
        assert self._open is not None
        custom = self._open.kind == "custom_tool_call"
        text = self._input.push(arguments) if custom else arguments
        return [self._open.extend(text)] if text else []

    def _begin(self, kind: Kind, call: dict[str, str] | None = None) -> list[StreamEvent]:
        events = self._end("completed")
        self._open = _Item(kind, len(self.ended), call or {})
        return events + self._open.begin()

    def _end(self, status: str) -> list[StreamEvent]:
        if self._open is None:
            return []
        custom = self._open.kind == "custom_tool_call"
        rest = self._input.flush() if custom else ""
        events = [self._open.extend(rest)] if rest else []
        events += self._open.end(status)
        self.ended.append(self._open.body(status))
        self._open = None
        return events


class _Item:
    """One item. call: `call_id` and `name`, and `namespace` if it has one, of a call."""

    def __init__(self, kind: Kind, index: int, call: dict[str, str]) -> None:
        self.kind = kind
        self._call = call
        self._texts: list[str] = []
        self._id = f"{_ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
        self._place: dict[str, Any] = {"item_id": self._id, "output_index": index}
        if kind not in _CALL_TEXTS:
            self._place["content_index"] = 0

    def begin(self) -> list[StreamEvent]:
        added = self._item_event("added", self.body("in_progress"))
        return [added] if self._is_call else [added, self._part_event("added")]

    def extend(self, text: str) -> StreamEvent:
        self._texts.append(text)
        return self._text_event("delta", {"delta": text})

    def end(self, status: str) -> list[StreamEvent]:
        item_done = self._item_event("done", self.body(status))
        if self._is_call:
            name = {"name": self._call["name"]} if self.kind == "function_call" else {}
            written = {**name, _CALL_TEXTS[self.kind]: self._text}
            return [self._text_event("done", written), item_done]
        text_done = self._text_event("done", {"text": self._text})
        return [text_done, self._part_event("done"), item_done]

    def body(self, status: str) -> dict[str, Any]:
        """The item; its content is empty while it is in progress."""
        head = {"id": self._id, "type": self.kind, "status": status}
        if self._is_call:
            return {**head, **self._call, _CALL_TEXTS[self.kind]: self._text}
        content = [] if status == "in_progress" else [self._part()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    @property
    def _is_call(self) -> bool:
        return self.kind in _CALL_TEXTS

    @property
    def _text(self) -> str:
        return "".join(self._texts)

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
