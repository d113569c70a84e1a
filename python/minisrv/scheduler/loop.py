"""The loop that turns messages into steps and steps into messages, one step ahead if asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from minisrv.engine.forward_batch import ForwardEngine
from minisrv.errors import InvalidRequestError
from minisrv.messages import (
    AbortMsg,
    AnswerMsg,
    DetokenizeMsg,
    Failure,
    FlushMsg,
    GenerateMsg,
)
from minisrv.scheduler.batch_builder import BatchBuilder
from minisrv.scheduler.channel import LocalChannel, ZmqChannel
from minisrv.scheduler.scheduler import Replies, Scheduler, Step
from minisrv.scheduler.stats import LoopStats


class SchedulerLoop:
    """Receive, schedule, launch, settle.

    `overlap_depth` steps stay in flight while the next is prepared: 0 where the engine computes in
    `launch`, 1 where it runs on a device.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: ForwardEngine,
        channel: ZmqChannel | LocalChannel,
        overlap_depth: int,
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.channel = channel
        self.overlap_depth = overlap_depth
        self.stats = LoopStats()
        self._builder = BatchBuilder(scheduler.cache.rows.size)
        self._in_flight: deque[tuple[Step, Any]] = deque()

    @property
    def busy(self) -> bool:
        """Whether a request is open or a step in flight."""
        return bool(self.scheduler.num_open or self._in_flight)

    def run(self, check: Callable[[], None]) -> None:
        """Turn until `check`, called between turns, raises."""
        while True:
            check()
            self.turn()

    def turn(self) -> None:
        """One round: blocks for messages only when there is nothing to do."""
        self._receive(wait=not self.busy)
        self.advance()
        self._send(self.scheduler.take_replies())
        if self.stats.due(self.scheduler.now, self.busy):
            self.channel.tell(self.stats.message(self.scheduler, self.channel.epoch))

    def advance(self) -> None:
        """Launch the next step, and settle what must be settled."""
        self.scheduler.now = time.monotonic()
        step = self.scheduler.schedule()
        if step is not None:
            self.stats.count_step(step)
            self._in_flight.append((step, self.engine.launch(self._builder.build(step))))
        stuck = step is None and not self._in_flight and self.scheduler.num_open
        assert not stuck, "requests are open, but no step can be made"
        depth = self.overlap_depth if step is not None else 0
        while len(self._in_flight) > depth:
            settled, handle = self._in_flight.popleft()
            self._settle(settled, self.engine.wait(handle).token_ids.tolist())

    def _settle(self, step: Step, token_ids: list[int]) -> None:
        now = self.scheduler.now = time.monotonic()
        num_first = self.stats.first_tokens(step, now) if step.sampling_prefills else 0
        self.stats.count_tokens(self.scheduler.settle(step, token_ids), num_first, now)

    def _receive(self, wait: bool) -> None:
        messages = self.channel.receive(wait)
        if messages:
            self.scheduler.now = time.monotonic()
        for message in messages:
            if isinstance(message, GenerateMsg):
                self.scheduler.add(message)
            elif isinstance(message, AbortMsg):
                self.scheduler.abort(message.uids)
            elif isinstance(message, FlushMsg):
                self.channel.tell(self._flush(message))

    def _flush(self, message: FlushMsg) -> AnswerMsg:
        """Empty the cache, unless requests are open: these would keep parts of it."""
        cache, epoch = self.scheduler.cache, self.channel.epoch
        if num_open := self.scheduler.num_open:
            error = InvalidRequestError(f"{num_open} requests are open; the cache is flushed idle")
            return AnswerMsg(query=message.query, failure=Failure.from_error(0, error), epoch=epoch)
        num_pages = cache.tree.num_evictable
        cache.evict(num_pages)
        return AnswerMsg(query=message.query, value={"pages": num_pages}, epoch=epoch)

    def _send(self, replies: Replies) -> None:
        if not replies:
            return
        if replies.starts:
            self.stats.count_starts(replies)
        self.channel.send(
            DetokenizeMsg(
                uids=np.array(replies.uids, np.int64),
                token_ids=np.array(replies.token_ids, np.int32),
                finishes=np.frombuffer(bytes(replies.finishes), np.uint8),
                starts=tuple(replies.starts),
                failures=tuple(replies.failures),
                epoch=self.channel.epoch,
            )
        )
