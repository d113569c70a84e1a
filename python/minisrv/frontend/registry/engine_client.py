"""The frontend's sockets: an inbox for replies, outboxes to tokenizers and scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from minisrv.errors import EngineDeadError, MinisrvError
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import (
    FRONTEND_INBOX,
    AbortMsg,
    AnswerMsg,
    PromptsMsg,
    Query,
    ShowTreeMsg,
    StatsMsg,
    TakenMsg,
    TokenizeMsg,
    UserReply,
)
from minisrv.wire.sockets import AsyncInbox, BoundedOutbox, Epoch

logger = logging.getLogger("minisrv.frontend")


class EngineClient:
    """Connects a registry to the other processes; create it inside the event loop that runs it.

    error: why replies can no longer be read, after a bug; then every request has failed, and
    `on_error` is called: the server must end.
    """

    def __init__(
        self,
        run_dir: Path,
        registry: RequestRegistry,
        num_tokenizers: int,
        epoch: int,
        on_error: Callable[[], None],
    ) -> None:
        self.error: MinisrvError | None = None
        self._registry = registry
        self._on_error = on_error
        self._run_dir, self._num_tokenizers = run_dir, num_tokenizers
        self._epoch = Epoch(epoch)
        self._inbox = AsyncInbox(run_dir, "frontend", FRONTEND_INBOX, self._epoch)
        self._open_outboxes()
        self._receiving: asyncio.Task[None] | None = None
        registry.connect(self._send)

    async def __aenter__(self) -> EngineClient:
        self._receiving = asyncio.create_task(self._receive(), name="receive replies")
        return self

    async def __aexit__(self, *raised: object) -> None:
        assert self._receiving is not None
        self._receiving.cancel()
        await asyncio.gather(self._receiving, return_exceptions=True)
        self._inbox.close()
        self._close_outboxes()

    def begin_epoch(self, number: int) -> None:
        """Drop what is on its way in either direction, and have the processes do so.

        Nothing happens if it is the present epoch.
        """
        if number == self._epoch.number:
            return
        self._epoch.number = number
        self._close_outboxes()
        self._open_outboxes()
        for outbox in (*self._tokenizers, self._scheduler):
            outbox.send_always(AbortMsg(uids=()))

    def _open_outboxes(self) -> None:
        self._tokenizers = [
            BoundedOutbox(self._run_dir, f"tokenizer-{i}", self._epoch)
            for i in range(self._num_tokenizers)
        ]
        self._scheduler = BoundedOutbox(self._run_dir, "scheduler", self._epoch)

    def _close_outboxes(self) -> None:
        for outbox in (*self._tokenizers, self._scheduler):
            outbox.close()

    def _send(self, index: int, message: TokenizeMsg | AbortMsg | Query) -> None:
        """Send to a tokenizer; an abort also to the scheduler, past what the tokenizer works on.
        What concerns no tokenizer goes to the scheduler only.

        The scheduler ignores uids that it does not know yet: for those the other abort follows.
        """
        if isinstance(message, AbortMsg):
            self._scheduler.send_always(message)
            self._tokenizers[index].send_always(message)
        elif isinstance(message, ShowTreeMsg):
            self._scheduler.send_always(message)
        else:
            self._tokenizers[index].send(message)

    async def _receive(self) -> None:
        try:
            await self._inbox.deliver_to(self._take)
        except Exception as error:
            logger.exception("replies cannot be read")
            self.error = EngineDeadError(f"replies cannot be read: {error}")
            self._registry.fail_all(self.error)
            self._on_error()

    def _take(self, message: UserReply | AnswerMsg | StatsMsg | PromptsMsg | TakenMsg) -> None:
        if isinstance(message, TakenMsg):
            self._tokenizers[message.tokenizer].count_taken(message.num_bytes)
        else:
            self._registry.receive(message)
