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
        self._choices_per_prompt = choices_per_prompt
        self._prompts: dict[int, tuple[int, int]] = {}
        self._outputs: dict[int, int] = {}
        self._reasoning: dict[int, int] = {}

    def count(self, event: Event) -> None:
        if event.start is not None and event.index % self._choices_per_prompt == 0:
            self._prompts[event.index] = (event.start.prompt_tokens, event.start.cached_tokens)
        if event.deltas:
            self._outputs[event.index] = event.output_tokens
        if event.reasoning_tokens:
            self._reasoning[event.index] = event.reasoning_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt for prompt, _ in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        return sum(cached for _, cached in self._prompts.values())

    @property
    def output_tokens(self) -> int:
        return sum(self._outputs.values())

    @property
    def reasoning_tokens(self) -> int:
        return sum(self._reasoning.values())
