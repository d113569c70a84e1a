"""The loop that turns messages into steps and steps into messages, one step ahead if asked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from minisrv.engine.forward_batch import ForwardEngine, ForwardOutput
from minisrv.errors import InvalidRequestError
from minisrv.scheduler.batch_builder import BatchBuilder
from minisrv.scheduler.channel import LocalChannel, ZmqChannel
from minisrv.scheduler.grammars import Grammars
from minisrv.scheduler.replies import Replies
from minisrv.scheduler.request import Request
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.stats import LoopStats
from minisrv.scheduler.step import Step
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DetokenizeMsg,
    Failure,
    FlushMsg,
    GenerateMsg,
)

COMPILE_POLL_S = 0.005


class SchedulerLoop:
    """Receive, schedule, launch, settle.

    `overlap_depth` steps stay in flight while the next is prepared: 0 where the engine computes in
    `launch`, 1 where it runs on a device. A step with a grammar's masks settles the one before
    when its own forward is on its way; the masks are filled while the device computes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: ForwardEngine,
        channel: ZmqChannel | LocalChannel,
        overlap_depth: int,
        compiler: GrammarCompiler | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.channel = channel
        self.overlap_depth = overlap_depth
        self._grammars = None if compiler is None else Grammars(scheduler, compiler)
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
        if self._grammars is not None:
            self._grammars.deliver()
        self.advance()
        self._send(self.scheduler.take_replies())
        if self.stats.due(self.scheduler.now, self.busy):
            self.channel.send_to_frontend(self.stats.message(self.scheduler))

    def advance(self) -> None:
        """Launch the next step, and settle what must be settled."""
        self.scheduler.now = time.monotonic()
        step = self.scheduler.schedule()
        if step is not None:
            self.stats.count_step(step)
            batch = self._builder.build(step, self._fill_masks)
            self._in_flight.append((step, self.engine.launch(batch)))
        elif not self._in_flight and self.scheduler.num_open:
            assert self.scheduler.num_compiling, "requests are open, but no step can be made"
            assert self._grammars is not None
            self._grammars.wait(COMPILE_POLL_S)
        self._settle(self.overlap_depth if step is not None else 0)

    def _settle(self, depth: int) -> None:
        """Settle steps, oldest first, until `depth` are in flight."""
        while len(self._in_flight) > depth:
            settled, handle = self._in_flight.popleft()
            self._settle_step(settled, self.engine.wait(handle))

    def _settle_step(self, step: Step, output: ForwardOutput) -> None:
        now = self.scheduler.now = time.monotonic()
        num_first = self.stats.first_tokens(step, now) if step.sampling_prefills else 0
        count = self.scheduler.settle(step, output.token_ids.tolist(), output.logprobs)
        self.stats.count_tokens(count, num_first, now)

    def _fill_masks(self, requests: list[Request]) -> Int32Array:
        """The masks of the step that is being launched, which is not in flight yet."""
        self._settle(0)
        assert self._grammars is not None
        return self._grammars.masks(requests)

    def _receive(self, wait: bool) -> None:
        messages = self.channel.receive(wait)
        if messages:
            self.scheduler.now = time.monotonic()
        for message in messages:
            if isinstance(message, GenerateMsg):
                self.scheduler.add(message)
                if message.sampling.grammar is not None:
                    self._request_grammar(message)
            elif isinstance(message, AbortMsg):
                self.scheduler.abort(message.uids)
            elif isinstance(message, FlushMsg):
                self.channel.send_to_frontend(self._flush(message))

    def _flush(self, message: FlushMsg) -> AnswerMsg:
        """Empty the cache, unless requests are open: these would keep parts of it."""
        cache = self.scheduler.cache
        if num_open := self.scheduler.num_open:
            error = InvalidRequestError(f"{num_open} requests are open; the cache is flushed idle")
            return AnswerMsg(query=message.query, failure=Failure.from_error(0, error))
        num_pages = cache.tree.num_evictable
        cache.evict(num_pages)
        return AnswerMsg(query=message.query, value={"pages": num_pages})

    def _request_grammar(self, message: GenerateMsg) -> None:
        if self._grammars is not None:
            self._grammars.request(message)
            return
        error = InvalidRequestError("this model has no structured output")
        for uid in range(message.uid, message.uid + message.sampling.n):
            self.scheduler.fail(uid, error)

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
                progress=tuple(replies.progress),
                at=self.scheduler.now,
                logprobs=tuple(replies.logprobs),
            )
        )
