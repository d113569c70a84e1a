"""The frontend's sockets: an inbox for replies, an outbox to each tokenizer."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from minisrv.errors import EngineDeadError
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import FRONTEND_INBOX
from minisrv.wire.sockets import AsyncInbox, Outbox

logger = logging.getLogger("minisrv.frontend")


class EngineClient:
    """Connects a registry to the other processes; create it inside the event loop that runs it."""

    def __init__(
        self, run_dir: Path, registry: RequestRegistry, num_tokenizers: int, epoch: int
    ) -> None:
        self._registry = registry
        self._inbox = AsyncInbox(run_dir, "frontend", FRONTEND_INBOX, epoch)
        self._outboxes = [Outbox(run_dir, f"tokenizer-{i}", epoch) for i in range(num_tokenizers)]
        self._receiving: asyncio.Task[None] | None = None
        registry.connect(lambda index, message: self._outboxes[index].send(message))

    async def __aenter__(self) -> EngineClient:
        self._receiving = asyncio.create_task(self._receive(), name="receive replies")
        return self

    async def __aexit__(self, *raised: object) -> None:
        assert self._receiving is not None
        self._receiving.cancel()
        await asyncio.gather(self._receiving, return_exceptions=True)
        self._inbox.close()
        for outbox in self._outboxes:
            outbox.close()

    async def _receive(self) -> None:
        try:
            await self._inbox.deliver_to(self._registry.receive)
        except Exception as error:
            logger.exception("replies cannot be read")
            self._registry.fail_all(EngineDeadError(f"replies cannot be read: {error}"))
