"""Build an assistant message incrementally, as OpenAI deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisrv.frontend.registry.events import Event
from minisrv.frontend.tool_calls.formats import CallReading as CallReading
from minisrv.frontend.tool_calls.parser import CallParser
from minisrv.frontend.tool_calls.pieces import Piece, Text, ToolCallArguments, ToolCallStart
from minisrv.wire.messages import Finish

Delta = dict[str, Any]


class AssistantMessage:
    """One choice's message. Its deltas, merged, are the whole message, however the text was cut."""

    __slots__ = ("_parser", "_reasoning_fields", "_said")

    def __init__(self, reading: CallReading | None, reasoning_fields: Sequence[str]) -> None:
        """`reading` None: no calls are looked for. A reasoning stands in all `reasoning_fields`."""
        self._reasoning_fields = reasoning_fields
        self._parser: CallParser | None = None if reading is None else reading.make_parser()
        self._said = False

    def deltas(self, event: Event) -> list[Delta]:
        """What an event adds."""
        deltas: list[Delta] = []
        if event.reasoning and (reasoning := event.reasoning_text):
            deltas.append(dict.fromkeys(self._reasoning_fields, reasoning))
        text = event.text
        if self._parser is None:
            if text:
                deltas.append({"content": text})
            return deltas
        pieces = self._parser.push(text)
        if event.final:
            pieces += self._parser.flush()
        deltas += [self._delta(piece) for piece in pieces]
        self._said = self._said or bool(deltas)
        # Where calls may come, a stream begins without content: an empty reply's is told here.
        return deltas if self._said or not event.final else [{"content": ""}]

    def whole(self, event: Event) -> dict[str, Any]:
        """The message of a choice whose only event is `event`."""
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        calls: list[dict[str, Any]] = []
        for delta in self.deltas(event):
            for name, value in delta.items():
                if name == "tool_calls":
                    _merge_call(calls, value[0])
                else:
                    message[name] = message.get(name, "") + value
        if calls:
            message["tool_calls"] = calls
        if not message["content"] and len(message) > 3:
            message["content"] = None
        return message

    @property
    def in_call(self) -> bool:
        """Whether a call has begun that has not come to its end."""
        return self._parser is not None and not self._parser.whole

    def calls_tools(self, event: Event) -> bool:
        """Whether the message, ended by `event`, asks for its calls to be made: none is cut off."""
        parser = self._parser
        if parser is None or not parser.num_calls or not parser.whole:
            return False
        return parser.ended or event.finish is not Finish.LENGTH

    def _delta(self, piece: Piece) -> Delta:
        match piece:
            case Text(text):
                return {"content": text}
            case ToolCallStart(index, id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": id, "type": "function", "function": function}
            case ToolCallArguments(index, text):
                call = {"index": index, "function": {"arguments": text}}
        return {"tool_calls": [call]}


def _merge_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add a call's delta to the whole calls, which have no index."""
    if "id" in delta:
        calls.append({name: value for name, value in delta.items() if name != "index"})
    else:
        calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
