"""A model that answers conversations as a script says, with a context as large as agents need."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import AbortMsg, GenerateMsg, TokenizeMsg, TokenizerQuery
from tests.support.played_model import CHAT, PlayedModel

CONTEXT = 131_072
# How calls are written, and nothing that begins or ends a thought.
TEMPLATE = CHAT.replace("CALLS", "<tool_call></tool_call>")


@dataclass(frozen=True)
class Conversation:
    """What the chat template gets: messages with their roles, and tools."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]

    @property
    def tool_names(self) -> list[str]:
        return [tool.get("function", tool)["name"] for tool in self.tools]

    @property
    def results(self) -> list[str]:
        """What the tools returned so far."""
        return [str(m["content"]) for m in self.messages if m["role"] == "tool"]

    @property
    def num_replies(self) -> int:
        return sum(m["role"] == "assistant" for m in self.messages)


Script = Callable[[Conversation], str]


class Cut(str):
    """A reply that its limit ends here."""


def call(name: str, **arguments: Any) -> str:
    """A tool call as Hermes' models write it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


class ScriptedModel(PlayedModel):
    """conversations: all that were asked, in order."""

    def __init__(self, registry: RequestRegistry, script: Script, context: int = CONTEXT) -> None:
        super().__init__(registry, TEMPLATE, max_seq_len=context)
        self.info = replace(self.info, name="demo", max_model_len=context)
        self.conversations: list[Conversation] = []
        self._script = script
        self._replies: dict[int, str] = {}

    def send(self, tokenizer_index: int, message: TokenizeMsg | AbortMsg | TokenizerQuery) -> None:
        if isinstance(message, TokenizeMsg) and message.messages is not None:
            conversation = Conversation(message.messages, message.tools or ())
            self.conversations.append(conversation)
            reply = self._replies[message.uid] = self._script(conversation)
            if isinstance(reply, Cut):
                num_tokens = len(self.tokenizer.encode(reply, add_special_tokens=False))
                sampling = replace(message.sampling, max_tokens=num_tokens)
                message = replace(message, sampling=sampling)
        super().send(tokenizer_index, message)

    def reply_to(self, message: GenerateMsg) -> str:
        return self._replies[message.uid]
