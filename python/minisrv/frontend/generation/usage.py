"""Counts the tokens of a request."""

from __future__ import annotations

from minisrv.wire.events import Event


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
