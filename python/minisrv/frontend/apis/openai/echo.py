"""The text of completions and its logprobs, after the prompt where that is echoed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from minisrv.frontend.apis.openai.logprobs import echo_logprobs, moved_logprobs
from minisrv.frontend.generation.request import Prompt
from minisrv.frontend.registry.events import Event
from minisrv.wire.logprobs import SpelledLogprobs


class PromptEchoes:
    """Adds prompts to the text of one reply. A text prompt is echoed as the client sent it."""

    def __init__(self, prompts: Sequence[Prompt], choices_per_prompt: int) -> None:
        self._prompts = prompts
        self._choices_per_prompt = choices_per_prompt
        self._moved_by: dict[int, int] = defaultdict(int)

    def text_of(self, event: Event) -> tuple[str, list[SpelledLogprobs]]:
        """The text and the logprobs that an event adds."""
        if event.echo is None:
            moved_by = self._moved_by.get(event.index, 0)
            logprobs = event.logprobs
            return event.text, moved_logprobs(logprobs, moved_by) if moved_by else logprobs
        echo, sent = event.echo, self._prompts[event.index // self._choices_per_prompt]
        logprobs = [] if echo.logprobs is None else [echo.logprobs]
        if not isinstance(sent, str):
            return echo.text + event.text, logprobs + event.logprobs
        # Offsets of the output were counted after the text that the prompt's tokens spell.
        moved_by = self._moved_by[event.index] = len(sent) - len(echo.text)
        logprobs = [echo_logprobs(part, sent) for part in logprobs]
        return sent + event.text, logprobs + moved_logprobs(event.logprobs, moved_by)
