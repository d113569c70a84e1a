"""Counts the tokens of a request."""

from __future__ import annotations

from minisrv.wire.events import Event


class Usage:
    """Each prompt counts once, however many choices it has."""

    def __init__(self, choices_per_prompt: int) -> None:
        self._choices_per_prompt = choices_per_prompt
        self._prompts: dict[int, tuple[int, int]] = {}
        self._outputs: dict[int, int] = {}
        self._reasoning: dict[int, int] = {}

    def count(self, event: Event) -> None:
        """Take over the counts of an event."""
        if event.start is not None and event.index % self._choices_per_prompt == 0:
            self._prompts[event.index] = (event.start.prompt_tokens, event.start.cached_tokens)
        if event.deltas:
            self._outputs[event.index] = event.output_tokens
        if event.reasoning_tokens:
            self._reasoning[event.index] = event.reasoning_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt for prompt, _ in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(cached for _, cached in self._prompts.values())

    @property
    def output_tokens(self) -> int:
        """Output tokens of all choices, reasoning included."""
        return sum(self._outputs.values())

    @property
    def reasoning_tokens(self) -> int:
        """Reasoning tokens of all choices."""
        return sum(self._reasoning.values())
