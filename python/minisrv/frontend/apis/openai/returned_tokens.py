"""Token ids and the prompt in a reply, for requests that ask for them.

They stand where vLLM has them: `token_ids` in each choice; `prompt_token_ids` once per prompt, at
the top of a chat's reply or first chunk, and in the first choice of each prompt of a completion.
`prompt`, the text, stands beside it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.registry.events import Event
from minisrv.wire.messages import ShownPrompt


class ReturnedTokens:
    """Collects from events, and writes into the next chunk of the choice or into the whole reply.

    Nothing is lost with an event that gives no chunk, such as one whose text is held back.
    """

    def __init__(self, *, token_ids: bool, at_top: bool) -> None:
        self._token_ids = token_ids
        self._at_top = at_top
        self._prompts: dict[int, ShownPrompt] = {}
        self._ids: dict[int, list[int]] = defaultdict(list)

    @classmethod
    def of(cls, request: GenerationRequest, *, at_top: bool) -> ReturnedTokens | None:
        """For a request that asks for ids or prompt. at_top: prompts go to the top of the reply."""
        if not request.reply.token_ids and not request.reply.prompt_text:
            return None
        return cls(token_ids=request.reply.token_ids, at_top=at_top)

    def collect_prompt(self, event: Event) -> None:
        """Keep the prompt of an event."""
        if event.start is not None and event.start.shown_prompt is not None:
            self._prompts[event.index] = event.start.shown_prompt

    def collect_ids(self, event: Event) -> None:
        """Keep the token ids of an event."""
        self._ids[event.index] += event.token_ids

    def write(self, index: int, choice: dict[str, Any], reply: dict[str, Any]) -> None:
        """Move what was kept for choice `index` into it, or into the reply around it."""
        prompt = self._prompts.pop(index, None)
        if prompt is not None:
            place = reply if self._at_top else choice
            if prompt.ids is not None:
                place["prompt_token_ids"] = prompt.ids.tolist()
            if prompt.text is not None:
                place["prompt"] = prompt.text
        if self._token_ids:
            choice["token_ids"] = self._ids.pop(index, [])
