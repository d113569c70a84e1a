"""The text of completions and its scores, behind the prompt where that is echoed."""

from __future__ import annotations

from collections import defaultdict

from minisrv.frontend.generation.logprobs import echo_logprobs, moved_logprobs
from minisrv.frontend.registry.events import Event
from minisrv.wire.logprobs import SpelledLogprobs


class CompletionTexts:
    """Takes the events of one reply. A prompt is echoed as it was sent."""

    def __init__(self, echoed: tuple[str | None, ...], choices_per_prompt: int) -> None:
        """echoed: prompts as they were sent, None for token ids."""
        self._echoed = echoed
        self._choices_per_prompt = choices_per_prompt
        self._moved_by: dict[int, int] = defaultdict(int)

    def add(self, event: Event) -> tuple[str, list[SpelledLogprobs]]:
        """What an event adds."""
        if event.echo is None:
            moved_by = self._moved_by.get(event.index, 0)
            return event.text, moved_logprobs(
                event.logprobs, moved_by
            ) if moved_by else event.logprobs
        echo, sent = event.echo, self._echoed[event.index // self._choices_per_prompt]
        scores = [] if echo.logprobs is None else [echo.logprobs]
        if sent is None:
            return echo.text + event.text, scores + event.logprobs
        # Offsets of the output were counted behind what the prompt's tokens spell.
        moved_by = self._moved_by[event.index] = len(sent) - len(echo.text)
        scores = [echo_logprobs(part, sent) for part in scores]
        return sent + event.text, scores + moved_logprobs(event.logprobs, moved_by)
