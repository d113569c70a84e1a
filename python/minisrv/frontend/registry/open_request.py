"""One accepted request at the frontend: what arrived for its uids, and who waits for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from minisrv.errors import MinisrvError
from minisrv.wire.events import Event


class RequestAborted(Exception):
    """The request was aborted while its reader waited."""


@dataclass(slots=True, eq=False, repr=False)
class OpenRequest:
    """What the registry keeps of a request.

    live: uids without a final. tokenizers: which one each sent uid went to.

    changed: something waits for the reader. silence: the timer that ends a wait without anything.
    unread: what had come for it when it was closed.
    cancelled: why the reader, which still has to take it, gets nothing more.
    """

    base: int
    live: set[int]
    request_id: str = ""
    tokenizers: dict[int, int] = field(default_factory=dict)
    pending: dict[int, Event] = field(default_factory=dict)
    unread: list[Event] = field(default_factory=list)
    changed: bool = False
    waiter: asyncio.Future[None] | None = None
    silence: asyncio.TimerHandle | None = None
    wants_deltas: bool = True
    failed: bool = False
    aborted: bool = False
    cancelled: MinisrvError | None = None

    def __repr__(self) -> str:
        state = "aborted" if self.aborted else "failed" if self.failed else "open"
        return f"<OpenRequest {self.base} {state} live={sorted(self.live)}>"

    @property
    def settled(self) -> bool:
        """Whether a reader of whole texts has nothing more to wait for."""
        return self.aborted or self.failed or not self.live

    def wake_reader(self) -> None:
        """Wake the reader if there is something for it."""
        if self.wants_deltas or self.settled:
            self.change()

    def change(self) -> None:
        """End the reader's wait."""
        self.changed = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for `change`. A bare future, since every token of every stream awaits it."""
        if not self.changed:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter

    def end_silence(self, after_s: float) -> None:
        """Wake the reader after `after_s` seconds at the latest; one timer serves many waits."""

        def end() -> None:
            self.silence = None
            self.change()

        if self.silence is None:
            self.silence = asyncio.get_running_loop().call_later(after_s, end)

    def end_delivery(self) -> None:
        """Wake the reader after a delivery; the events of an aborted request are dropped."""
        if self.aborted:
            self.pending.clear()
        else:
            self.wake_reader()

    def close(self) -> None:
        """Nobody will read it any more; a waiting reader is woken."""
        self.aborted = True
        self.unread = list(self.pending.values())
        self.pending.clear()
        self.change()
        if self.silence is not None:
            self.silence.cancel()

    def take(self) -> list[Event]:
        """What has arrived. Raises RequestAborted after `close`, or why it was cancelled."""
        if self.aborted:
            raise self.cancelled or RequestAborted
        self.changed = False
        events = list(self.pending.values())
        self.pending.clear()
        return events
