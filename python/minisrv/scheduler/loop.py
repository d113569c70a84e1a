"""The loop of the scheduler process: receive, schedule, launch, settle, send."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from minisrv.engine.forward_batch import ForwardEngine
from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.sampling_params import Grammar
from minisrv.scheduler.batch_builder import BatchBuilder
from minisrv.scheduler.channel import Channel
from minisrv.scheduler.grammars import Grammars
from minisrv.scheduler.replies import Replies
from minisrv.scheduler.request import Request
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.stats import LoopStats
from minisrv.scheduler.step_plan import StepPlan
from minisrv.scheduler.tree_description import describe_tree
from minisrv.scheduler.tree_feed import TreeFeed
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.supervision.progress import MESSAGE, NoProgress, Progress
from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    DetokenizeMsg,
    Failure,
    FlushMsg,
    GenerateMsg,
    ShowTreeMsg,
)

COMPILE_POLL_S = 0.005
CHECK_VARIABLE = "MINISRV_CHECK"

logger = logging.getLogger("minisrv.scheduler")


class SchedulerLoop:
    """Keeps `overlap_depth` steps in flight while it prepares the next.

    That is 0 where the engine computes in `launch`, and 1 where it runs on a device:

        host     launch n | settle n-1 | receive, schedule, launch n+1 | settle n | ...
        device            | step n .............................. | step n+1 .......

    The one place where control runs backwards is a step with grammar masks. The masks depend on
    the tokens of step n-1, which need not be known to begin the forward pass of step n. So the
    engine calls `_fill_masks` from inside `launch`, after the forward pass is queued and before
    sampling is: it settles step n-1 and fills the masks while the device computes.

    compiler: the error says why the model has no structured output.
    progress: where the loop reports what it does.
    clock: the time in seconds; a simulation moves its own.
    feed: set by the caller to have the changes of the radix tree published.
    With MINISRV_CHECK=1 the scheduler's and the cache's invariants are asserted in every turn.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        engine: ForwardEngine,
        channel: Channel,
        overlap_depth: int,
        compiler: GrammarCompiler | MinisrvError | None = None,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.channel = channel
        self.overlap_depth = overlap_depth
        self._progress = progress or NoProgress()
        self._grammars = (
            Grammars(scheduler, compiler) if isinstance(compiler, GrammarCompiler) else None
        )
        self._no_grammars = str(compiler or "it has no vocabulary")
        self.stats = LoopStats()
        self.feed: TreeFeed | None = None
        self._builder = BatchBuilder(scheduler.cache.rows.size)
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
        self._clock = clock
        self._now = 0.0
        self._checks = os.environ.get(CHECK_VARIABLE) == "1"
        if self._checks:
            logger.warning("%s=1: invariants are checked after every step", CHECK_VARIABLE)

    @property
    def busy(self) -> bool:
        """Whether a request is open or a step is in flight."""
        return bool(self.scheduler.num_open or self._in_flight)

    def run(self, check_engine: Callable[[], None]) -> None:
        """Turn until `check_engine`, called between turns, raises."""
        while True:
            check_engine()
            self.turn()

    def turn(self) -> None:
        """One round. Blocks for messages only when there is nothing to do."""
        self._progress.beat()
        self._receive(wait=not self.busy)
        if self._grammars is not None:
            self._grammars.deliver()
        self.advance()
        self._send(self.scheduler.take_replies())
        if self.feed is not None:
            self.feed.send(self._now, busy=self.busy)
        if self.stats.due(self._now, self.busy):
            self.channel.send_to_frontend(self.stats.make_message(self.scheduler))

    def advance(self) -> None:
        """Launch the next step, and settle the steps before it down to `overlap_depth`."""
        self._now = self.scheduler.cache.tree.now = self._clock()
        plan = self.scheduler.schedule(self._now)
        if plan is not None:
            self.stats.count_launch(plan)
            self._in_flight.append((plan, self._launch(plan)))
        elif not self._in_flight and self.scheduler.num_open:
            assert self.scheduler.num_compiling, "requests are open, but no step can be planned"
            assert self._grammars is not None
            self._grammars.wait(COMPILE_POLL_S)
        self._settle_until(self.overlap_depth if plan is not None else 0)
        if self._checks:
            self.scheduler.check()

    def _launch(self, plan: StepPlan) -> Any:
        """Start a step; returns the engine's handle of it."""
        rows = self._builder.find_rows(plan)
        self._progress.begin(plan.step_id % 2, self._builder.uids[rows], plan.num_tokens)
        return self.engine.launch(self._builder.build_batch(plan, rows, self._fill_masks))

    def _settle_until(self, depth: int) -> None:
        """Settle steps, oldest first, until `depth` are in flight."""
        while len(self._in_flight) > depth:
            plan, handle = self._in_flight.popleft()
            output = self.engine.wait(handle)
            self._now = self._clock()
            outcome = self.scheduler.settle(
                plan, output.token_ids.tolist(), self._now, output.logprobs
            )
            self.stats.count_tokens(plan, outcome, self._now)
            self._progress.end(plan.step_id % 2)

    def _fill_masks(self, requests: list[Request]) -> Int32Array:
        """The masks of the step that is being launched; it is not in `_in_flight` yet."""
        self._settle_until(0)
        assert self._grammars is not None
        return self._grammars.masks(requests)

    def _receive(self, wait: bool) -> None:
        messages = self.channel.receive(wait)
        if self.channel.begins_epoch():
            self.scheduler.drop_requests()
            if self._grammars is not None:
                self._grammars.drop_requests()
            if self.feed is not None:
                self.feed.restart()
        if messages:
            self._now = self.scheduler.cache.tree.now = self._clock()
        for message in messages:
            if isinstance(message, GenerateMsg):
                uids = range(message.uid, message.uid + message.sampling.n)
                self._progress.begin(MESSAGE, np.array(uids))
                self.scheduler.add_request(message, self._now)
                if message.sampling.grammar is not None:
                    self._request_grammar(message, message.sampling.grammar)
                self._progress.end(MESSAGE)
            elif isinstance(message, AbortMsg):
                self.scheduler.abort_requests(message.uids, self._now)
            elif isinstance(message, FlushMsg):
                self.channel.send_to_frontend(self._flush_cache(message))
            elif isinstance(message, ShowTreeMsg):
                tree = describe_tree(self.scheduler.cache, message, self._now)
                self.channel.send_to_frontend(AnswerMsg(query=message.query, value=tree))

    def _flush_cache(self, message: FlushMsg) -> AnswerMsg:
        """Empty the cache. Refused while requests are open, which hold parts of it."""
        cache = self.scheduler.cache
        if num_open := self.scheduler.num_open:
            error = InvalidRequestError(
                f"the cache can be flushed only while no request is open; open now: {num_open}"
            )
            return AnswerMsg(query=message.query, failure=Failure.from_error(0, error))
        num_pages = cache.tree.num_evictable
        cache.evict(num_pages)
        return AnswerMsg(query=message.query, value={"pages": num_pages})

    def compile_grammar(self, grammar: Grammar) -> None:
        """Compile now what a request will need. Raises MinisrvError if that is not possible."""
        if self._grammars is None:
            raise self._no_grammars_for(grammar)
        self._grammars.compile(grammar)

    def close(self) -> None:
        """End the processes and threads that compile grammars; the engine is the caller's."""
        if self._grammars is not None:
            self._grammars.close()

    def _request_grammar(self, message: GenerateMsg, grammar: Grammar) -> None:
        if self._grammars is not None:
            self._grammars.request(message)
            return
        for uid in range(message.uid, message.uid + message.sampling.n):
            self.scheduler.fail_request(uid, self._no_grammars_for(grammar))

    def _no_grammars_for(self, grammar: Grammar) -> InvalidRequestError:
        return InvalidRequestError(
            f"{grammar.param} is not supported with this model: {self._no_grammars}",
            param=grammar.param,
            code="unsupported_parameter",
        )

    def _send(self, replies: Replies) -> None:
        if not replies:
            return
        self.stats.count_prompts(replies)
        self.channel.send(
            DetokenizeMsg(
                uids=np.array(replies.uids, np.int64),
                token_ids=np.array(replies.token_ids, np.int32),
                finishes=np.frombuffer(bytes(replies.finishes), np.uint8),
                starts=tuple(replies.starts),
                failures=tuple(replies.failures),
                progress=tuple(replies.progress),
                at=self._now,
                logprobs=tuple(replies.logprobs),
            )
        )
