"""One server in virtual time: the real loop, scheduler and cache around an engine that only waits.

A turn of the loop moves the clock as a real one takes time: by what the host does for the step,
and, where the loop waits for the engine, to the end of the step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from minisrv.engine.forward_batch import ForwardEngine, ForwardOutput
from minisrv.kvcache.manager import KVCacheManager
from minisrv.routing.router import ReplicaLoad
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.channel import Channel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.replies import Replies
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.stats import LoopStats
from minisrv.scheduler.step_plan import StepOutcome, StepPlan
from minisrv.simulation.records import Records
from minisrv.simulation.step_times import StepTimes, StepWork
from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import GenerateMsg, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerShape:
    """What decides the steps of a server; the options of the same names are described there.

    request_s: from a request's arrival to the scheduler's queue, and from a token to its client.
    """

    num_pages: int
    page_size: int
    max_seq_len: int
    max_prefill_tokens: int
    max_running_requests: int = 256
    overlap_depth: int = 1
    radix_cache: bool = True
    fair_keys: bool = False
    request_s: float = 0.0


class VirtualClock:
    """Seconds since the first request of the trace."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class VirtualEngine:
    """Takes the time of a step and makes up its tokens, which are negative and never repeat."""

    def __init__(self, times: StepTimes, clock: VirtualClock) -> None:
        self.busy_s = 0.0
        self._times = times
        self._clock = clock
        self._free_at = 0.0
        self._num_tokens = 0

    def launch(self, plan: StepPlan) -> tuple[float, Int32Array]:
        """Start a step, which begins when the one before has ended: when it ends, its tokens."""
        work = StepWork.of(plan)
        self._clock.now += self._times.host_s(work)
        seconds = self._times.device_s(work)
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self.busy_s += seconds
        first = self._num_tokens
        self._num_tokens = (first + work.samples) % 2**31
        return self._free_at, np.arange(~first, ~first - work.samples, -1).astype(np.int32)

    def wait(self, handle: tuple[float, Int32Array]) -> ForwardOutput:
        """See ForwardEngine."""
        ends_at, token_ids = handle
        self._clock.now = max(self._clock.now, ends_at)
        return ForwardOutput(token_ids)


class VirtualChannel:
    """Holds requests until they arrive, and notes when their tokens come out.

    `computed` and `ended`: when, and which uids have their first token, and their last.
    """

    def __init__(self, clock: VirtualClock, records: Records) -> None:
        self.inbox: deque[tuple[float, GenerateMsg]] = deque()
        self.computed: deque[tuple[float, int]] = deque()
        self.ended: deque[tuple[float, int]] = deque()
        self._clock = clock
        self._records = records

    def receive(self, wait: bool) -> list[Message]:
        """See Channel; never blocks."""
        messages: list[Message] = []
        while self.inbox and self.inbox[0][0] <= self._clock.now:
            messages.append(self.inbox.popleft()[1])
        return messages

    def begins_epoch(self) -> bool:
        """See Channel."""
        return False

    def take(self, replies: Replies, at: float) -> None:
        """Note the replies of the steps that have been settled by `at`."""
        ends = [uid for uid, end in zip(replies.uids, replies.finishes, strict=True) if end]
        self._records.take(replies, ends, at)
        ends += [failure.uid for failure in replies.failures]
        for failure in replies.failures:
            self.computed.append((at, failure.uid))
        for start in replies.starts:
            self.computed.append((at, start.uid))
        self.ended += [(at, uid) for uid in ends]


class NoStats(LoopStats):
    """Counts nothing, since the figures of a simulation come from its records."""

    def count_launch(self, plan: StepPlan) -> None:
        """See LoopStats."""

    def count_tokens(self, plan: StepPlan, outcome: StepOutcome, now: float) -> None:
        """See LoopStats."""

    def due(self, now: float, busy: bool) -> bool:
        """Never."""
        return False


class VirtualLoop(SchedulerLoop):
    """The loop without the arrays of batches and messages, since nothing reads them."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: VirtualEngine,
        channel: VirtualChannel,
        overlap_depth: int,
        clock: VirtualClock,
    ) -> None:
        real = cast(ForwardEngine, engine), cast(Channel, channel)  # for what is called here
        super().__init__(scheduler, *real, overlap_depth, clock=clock)
        self._launch_plan, self._take_replies = engine.launch, channel.take
        self.stats = NoStats()

    def _launch(self, plan: StepPlan) -> Any:
        return self._launch_plan(plan)

    def _send(self, replies: Replies) -> None:
        if replies:
            self._take_replies(replies, self._now)


class Replica:
    """A server, whose requests are numbered as in `records`."""

    def __init__(self, shape: ServerShape, times: StepTimes, records: Records) -> None:
        self.shape = shape
        self.clock = VirtualClock()
        self.engine = VirtualEngine(times, self.clock)
        self.channel = VirtualChannel(self.clock, records)
        self.scheduler = Scheduler(
            KVCacheManager(
                shape.num_pages,
                shape.max_running_requests,
                shape.page_size,
                radix_cache=shape.radix_cache,
            ),
            max_seq_len=min(shape.max_seq_len, shape.num_pages * shape.page_size),
            max_prefill_tokens=shape.max_prefill_tokens,
            eos_ids=(),
            new_seed=int,
            fair_keys=shape.fair_keys,
        )
        self._uncomputed: dict[int, int] = {}  # prompt tokens by uid
        self._queued_tokens = 0
        self._num_open = 0
        budget = shape.max_prefill_tokens
        full = StepWork(0, 0, 1, budget, budget * (budget + 1) // 2, 1)
        self._prefill_rate = budget / max(times.device_s(full), 1e-9)
        depth = shape.overlap_depth
        self.loop = VirtualLoop(self.scheduler, self.engine, self.channel, depth, self.clock)

    def send(self, uid: int, prompt_ids: Int32Array, output_tokens: int, now: float) -> None:
        """Let a request arrive at `now`, which is not before any earlier one."""
        sampling = SamplingParams(
            temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=output_tokens
        )
        message = GenerateMsg(uid=uid, prompt_ids=prompt_ids, sampling=sampling)
        self.channel.inbox.append((now + self.shape.request_s, message))
        tokens = len(prompt_ids) - self._num_cached(prompt_ids)
        self._uncomputed[uid] = tokens
        self._queued_tokens += tokens
        self._num_open += 1

    def load(self, now: float) -> ReplicaLoad:
        """The load at `now`, up to which all turns have been made.

        A prompt counts as a whole until its first token.
        """
        computed, ended = self.channel.computed, self.channel.ended
        while computed and computed[0][0] <= now:
            self._queued_tokens -= self._uncomputed.pop(computed.popleft()[1])
        while ended and ended[0][0] <= now:
            self._num_open -= 1
            ended.popleft()
        return ReplicaLoad(self._queued_tokens, self._num_open, self._prefill_rate)

    def advance(self, until: float) -> None:
        """Make all turns that begin before `until`."""
        while True:
            if not self.loop.busy:
                if not self.channel.inbox:
                    return
                self.clock.now = max(self.clock.now, self.channel.inbox[0][0])
            if self.clock.now >= until:
                return
            self.loop.turn()

    def _num_cached(self, prompt_ids: Int32Array) -> int:
        """Tokens of a prompt that the cache holds now."""
        tree = self.scheduler.cache.tree
        limit = (len(prompt_ids) - 1) // tree.page_size
        return tree.match(tree.root, prompt_ids, limit, -1).end * tree.page_size
