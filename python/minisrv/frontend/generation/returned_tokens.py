"""Token ids and prompt in a reply, for requests that ask for them.

The places are vLLM's: `token_ids` in each choice; `prompt_token_ids` once a prompt, at the top of a
chat's reply or first chunk, and in the first choice of each prompt of a completion. `prompt`, the
text, stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minisrv.frontend.fields.aliases import merge_aliases
from minisrv.frontend.registry.events import Event
from minisrv.wire.messages import ShownPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """token_ids: those of prompt and output. prompt: the text that the model saw."""

    token_ids: bool
    prompt: bool


def read_returned(fields: dict[str, Any]) -> Returned | None:
    """What a request wants to see, None for nothing. Raises InvalidRequestError."""
    merged = merge_aliases(fields)
    token_ids, prompt = merged.get("return_token_ids", False), fields.get("return_prompt", False)
    return Returned(token_ids=token_ids, prompt=prompt) if token_ids or prompt else None


class ReturnedTokens:
    """Puts what has come of ids and prompts into the next chunk of their choice, or into the whole
    reply. Nothing is lost with an event that gives no chunk: its text is held back, or it has none.
    """

    def __init__(self, returned: Returned, *, chat: bool) -> None:
        self._token_ids = returned.token_ids
        self._chat = chat
        self._prompts: dict[int, ShownPrompt] = {}
        self._ids: dict[int, list[int]] = {}

    def take_prompt(self, event: Event) -> None:
        """Keep the prompt that an event brings."""
        if event.start is not None and event.start.shown_prompt is not None:
            self._prompts[event.index] = event.start.shown_prompt

    def take_ids(self, event: Event) -> None:
        """Keep the ids that an event brings."""
        self._ids.setdefault(event.index, []).extend(event.token_ids)

    def put(self, index: int, choice: dict[str, Any], reply: dict[str, Any]) -> None:
        """Write what was kept for the choice `index` into it, or into the reply around it."""
        prompt = self._prompts.pop(index, None)
        if prompt is not None:
            place = reply if self._chat else choice
            if prompt.ids is not None:
                place["prompt_token_ids"] = prompt.ids.tolist()
            if prompt.text is not None:
                place["prompt"] = prompt.text
        if self._token_ids:
            choice["token_ids"] = self._ids.pop(index, [])
