"""Reads the events of one choice as pieces of a reply."""

from __future__ import annotations

from minisrv.frontend.generation.pieces import Finish, Piece, Reasoning, Text
from minisrv.frontend.tool_calls.formats import CallReading
from minisrv.wire.events import Event
from minisrv.wire.messages import Finish as FinishCode


class ChoiceReader:
    """Joined, its pieces do not depend on how the text was cut into events."""

    __slots__ = ("_parser",)

    def __init__(self, calls: CallReading | None) -> None:
        """calls: how tool calls are found; None to look for none."""
        self._parser = calls.make_parser() if calls is not None else None

    def read(self, event: Event) -> list[Piece]:
        """The pieces that `event`, which has no failure, adds."""
        text = event.text
        pieces: list[Piece] = []
        if event.reasoning and (reasoning := event.reasoning_text):
            pieces.append(Reasoning(reasoning))
        if self._parser is not None:
            pieces += self._parser.push(text)
            if event.final:
                pieces += self._parser.flush()
        elif text:
            pieces.append(Text(text))
        if event.final:
            pieces.append(self._finish(event))
        return pieces

    def _finish(self, event: Event) -> Finish:
        parser = self._parser
        in_call = parser is not None and not parser.whole
        cut = event.finish is FinishCode.LENGTH
        if parser is not None and parser.num_calls and not in_call and (parser.ended or not cut):
            return Finish("tool_calls", event.stop_reason)
        return Finish("length" if cut else "stop", event.stop_reason, in_call)
