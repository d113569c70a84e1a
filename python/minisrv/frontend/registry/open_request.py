"""One accepted request at the frontend: what arrived for its uids, and who waits for it.

It can be sent again when a process behind the frontend has died: it keeps its messages, and the
token ids of its output so far.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from minisrv.errors import MinisrvError
from minisrv.wire.arrays import Int32Array
from minisrv.wire.events import Event
from minisrv.wire.messages import Produced, TokenizeMsg

MAX_UNREAD_BYTES = 2**20
# Tokens of output since a process died while working on a request: after so many it was not the
# cause, and after fewer it probably was if others have more. The first few may be those that had
# been computed and were lost.
CLEARING_TOKENS = 256
PROVEN_TOKENS = 3
_LOOK_EVERY = 64  # deliveries


class RequestAborted(Exception):
    """The request was aborted while its reader waited."""


@dataclass(slots=True, eq=False, repr=False)
class OpenRequest:
    """What the registry keeps of a request; one reader waits for its events.

    live: uids without a final. messages: those that were sent, or will be once the engine serves
    again. tokenizers: which one each sent uid went to.
    prompt_lengths: tokens, by the first uid of a prompt that has been read.
    taken_ids: by uid, the output in events that the reader has taken. suspected_at: by uid, the
    length of its output when a process last died while working on it.
    changed: the reader has something to do. silence: the timer that ends its wait without events.
    unread: the events that nobody had read when it was closed. num_late: deliveries since the
    reader last took events, other than the first.
    cancelled: the error that its reader gets instead of further events.
    """

    base: int
    live: set[int]
    request_id: str = ""
    drop_reader: Callable[[], None] | None = None
    messages: list[TokenizeMsg] = field(default_factory=list)
    tokenizers: dict[int, int] = field(default_factory=dict)
    prompt_lengths: dict[int, int] = field(default_factory=dict)
    taken_ids: dict[int, array[int]] = field(default_factory=dict)
    suspected_at: dict[int, int] = field(default_factory=dict)
    pending: dict[int, Event] = field(default_factory=dict)
    unread: list[Event] = field(default_factory=list)
    changed: bool = False
    num_late: int = 0
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
        self.changed = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for `wake_reader`. A bare future, since every token of every stream awaits it."""
        if not self.changed:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter

    def end_silence(self, after_s: float) -> None:
        """Wake the reader after `after_s` seconds at the latest; one timer serves many waits."""

        def end() -> None:
            self.silence = None
            self.wake_reader()

        if self.silence is None:
            self.silence = asyncio.get_running_loop().call_later(after_s, end)

    def end_delivery(self) -> None:
        """Wake the reader after a delivery; the events of an aborted request are dropped."""
        if self.aborted:
            self.pending.clear()
        elif self.wants_deltas or self.settled:
            self.num_late += self.changed
            self.wake_reader()

    def leaves_too_much(self) -> bool:
        """Whether the reader, which can be dropped, has left more than MAX_UNREAD_BYTES.

        The bytes are counted only every few deliveries.
        """
        if self.drop_reader is None or self.aborted or self.num_late % _LOOK_EVERY:
            return False
        return sum(event.num_bytes for event in self.pending.values()) > MAX_UNREAD_BYTES

    def close(self) -> None:
        """Nobody will read further events; a waiting reader is woken."""
        self.aborted = True
        self.unread = list(self.pending.values())
        self.pending.clear()
        self.wake_reader()
        if self.silence is not None:
            self.silence.cancel()

    def take_events(self) -> list[Event]:
        """The pending events. Raises RequestAborted after `close`, or the error of `cancelled`."""
        if self.aborted:
            raise self.cancelled or RequestAborted
        self.changed, self.num_late = False, 0
        events = list(self.pending.values())
        self.pending.clear()
        for event in events:
            if event.token_ids:
                self.taken_ids.setdefault(event.uid, array("i")).extend(event.token_ids)
        return events

    def continued(self, message: TokenizeMsg) -> TokenizeMsg | None:
        """One of its messages, to go on where its choices stopped; None if all have ended."""
        uids = range(message.uid, message.uid + message.sampling.n)
        produced = tuple(
            Produced(uid=uid, token_ids=self._output(uid)) for uid in uids if uid in self.live
        )
        if len(produced) == len(uids) and not any(len(one.token_ids) for one in produced):
            return message
        return replace(message, resumed=produced) if produced else None

    def suspect(self, uid: int) -> int | None:
        """Note that a process died while working on `uid`.

        Returns the tokens of output since that happened before; None if it did not, or if they are
        CLEARING_TOKENS or more.
        """
        before, now = self.suspected_at.get(uid), len(self._output(uid))
        self.suspected_at[uid] = now
        return None if before is None or now - before >= CLEARING_TOKENS else now - before

    @property
    def is_proven(self) -> bool:
        """Whether each choice that was a suspect has gone on, or has ended."""
        return self.aborted or all(
            len(self._output(uid)) >= before + PROVEN_TOKENS
            for uid, before in self.suspected_at.items()
            if uid in self.live
        )

    def _output(self, uid: int) -> Int32Array:
        taken = np.array(self.taken_ids.get(uid, ()), np.int32)
        event = self.pending.get(uid)
        return taken if event is None else np.append(taken, np.array(event.token_ids, np.int32))
