"""Reads events: the pieces of each choice, and the token counts of a request."""

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
                pieces += self._parser.flush(cut_off=_is_cut_off(event))
        elif text:
            pieces.append(Text(text))
        if event.final:
            pieces.append(self._finish(event))
        return pieces

    def _finish(self, event: Event) -> Finish:
        parser = self._parser
        in_call = parser is not None and not parser.whole
        at_limit = event.finish is FinishCode.LENGTH
        cut_off = at_limit or in_call or (parser is not None and parser.lost_call)
        if parser is not None and parser.num_calls and (parser.ended or not cut_off):
            return Finish("tool_calls", event.stop_reason)
        return Finish("length" if at_limit else "stop", event.stop_reason, in_call)


def _is_cut_off(event: Event) -> bool:
    """Whether a limit or a stop string ended the text, and not the model."""
    return event.finish is FinishCode.LENGTH or event.stop_reason is not None


class Usage:
    """Token counts over all choices. A prompt counts once, however many choices it has.

    cached_tokens: of the prompts, found in the prefix cache. output_tokens include reasoning.
    """

    def __init__(self, choices_per_prompt: int) -> None:
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.reasoning_tokens = 0
        self._choices_per_prompt = choices_per_prompt
        self._prompts: set[int] = set()
        self._outputs: dict[int, int] = {}
        self._reasoning: dict[int, int] = {}

    def count(self, event: Event) -> None:
        """Add what an event counts; one that is counted again adds nothing."""
        if event.start is not None and self._is_new_prompt(event.index):
            self.prompt_tokens += event.start.prompt_tokens
            self.cached_tokens += event.start.cached_tokens
        if event.deltas:
            self.output_tokens += event.output_tokens - self._outputs.get(event.index, 0)
            self._outputs[event.index] = event.output_tokens
        if event.reasoning_tokens:
            before = self._reasoning.get(event.index, 0)
            self.reasoning_tokens += event.reasoning_tokens - before
            self._reasoning[event.index] = event.reasoning_tokens

    def _is_new_prompt(self, index: int) -> bool:
        if index % self._choices_per_prompt or index in self._prompts:
            return False
        self._prompts.add(index)
        return True
