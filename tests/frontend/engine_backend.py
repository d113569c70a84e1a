"""The real engine behind the application, with the workers of all processes in one thread."""

from __future__ import annotations

import asyncio

from http_server import MODEL

from minisrv.chat_format import find_chat_format
from minisrv.frontend.model_info import ModelInfo
from minisrv.frontend.request_registry import RequestRegistry
from minisrv.llm import LLM
from minisrv.message_codec import decode, encode
from minisrv.messages import (
    FRONTEND_INBOX,
    TOKENIZER_INBOX,
    AbortMsg,
    GenerateMsg,
    TokenizeMsg,
    UserReply,
)


class EngineBackend:
    """Serves what `llm`, which nobody else uses meanwhile, would give offline."""

    def __init__(self, registry: RequestRegistry, llm: LLM) -> None:
        self.llm = llm
        self.info = ModelInfo(
            name=MODEL.name,
            created=MODEL.created,
            max_model_len=llm.max_seq_len,
            vocab_size=llm.model_config.vocab_size,
            defaults=llm.model_config.sampling_defaults,
            chat_format=find_chat_format(llm.tokenizer.chat_templates),
        )
        self._registry = registry
        self._task: asyncio.Task[None] | None = None
        registry.connect(self.send)

    def send(self, tokenizer_index: int, message: TokenizeMsg | AbortMsg) -> None:
        message = decode(encode(message), TOKENIZER_INBOX)  # type: ignore[assignment]
        if isinstance(message, AbortMsg):
            self.llm._channel.inbox.append(message)
        else:
            for made in self.llm._tokenizer.handle(message):
                if isinstance(made, UserReply):
                    self._deliver(made)
                elif isinstance(made, GenerateMsg):
                    self.llm._channel.inbox.append(made)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        loop, channel = self.llm._loop, self.llm._channel
        while loop.busy or channel.inbox:
            loop.turn()
            while channel.outbox:
                reply, aborts = self.llm._detokenizer.handle(channel.outbox.popleft())
                if aborts is not None:
                    channel.inbox.append(aborts)
                if reply is not None:
                    self._deliver(reply)
            await asyncio.sleep(0)

    def _deliver(self, reply: UserReply) -> None:
        self._registry.deliver(decode(encode(reply), FRONTEND_INBOX))  # type: ignore[arg-type]
