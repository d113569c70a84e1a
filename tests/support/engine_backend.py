"""A server in one process, whole but for the sockets behind: an `LLM` answers its requests."""

from __future__ import annotations

import asyncio
import time

from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.llm import LLM
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import (
    DETOKENIZER_INBOX,
    FRONTEND_INBOX,
    SCHEDULER_INBOX,
    TOKENIZER_INBOX,
    AbortMsg,
    AnswerMsg,
    Query,
    TokenizeMsg,
    UserReply,
)
from tests.support.http_server import MODEL


class EngineBackend:
    """Turns the LLM's own loop while requests are open; every message crosses the wire form."""

    def __init__(self, registry: RequestRegistry, llm: LLM) -> None:
        self.llm = llm
        self.info = ModelInfo(
            name=MODEL.name,
            created=int(time.time()),
            max_model_len=llm.max_seq_len,
            max_tokens_policy=llm.config.max_tokens_policy,
            vocab_size=llm.model_config.vocab_size,
            defaults=llm.sampling_defaults,
            chat_format=llm._tokenizer.chat_format,
        )
        self._registry = registry
        self._pump: asyncio.Task[None] | None = None
        registry.connect(self.send)

    def send(self, tokenizer_index: int, message: TokenizeMsg | AbortMsg | Query) -> None:
        received = decode(encode(message), TOKENIZER_INBOX)
        outgoing = self.llm._tokenizer.handle(received)  # type: ignore[arg-type]
        if isinstance(outgoing, UserReply | AnswerMsg):
            self._registry.receive(decode(encode(outgoing), FRONTEND_INBOX))  # type: ignore[arg-type]
        else:
            self.llm._channel.inbox.append(decode(encode(outgoing), SCHEDULER_INBOX))  # type: ignore[arg-type]
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._turn())

    async def _turn(self) -> None:
        channel, loop = self.llm._channel, self.llm._loop
        while loop.busy or channel.inbox:
            loop.turn()
            while channel.outbox:
                step = decode(encode(channel.outbox.popleft()), DETOKENIZER_INBOX)
                reply, aborts = self.llm._detokenizer.handle(step)  # type: ignore[arg-type]
                if aborts is not None:
                    channel.inbox.append(aborts)
                if reply is not None:
                    self._registry.receive(decode(encode(reply), FRONTEND_INBOX))  # type: ignore[arg-type]
            await asyncio.sleep(0)
