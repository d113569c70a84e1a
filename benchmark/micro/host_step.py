"""What a decode step costs the host: python benchmark/micro/host_step.py [--results FILE].

Runs the scheduler's real loop and messages around an engine that returns at once. The time of a
step covers everything the scheduler process does for it: decode the incoming frames, schedule, take
pages, build the batch and the indices that an engine derives from it, settle the tokens with their
stop checks, and encode the reply. Requests end and others join all the time, some with a prefix
that is in the cache.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from random import Random

import numpy as np

from minisrv.engine.forward_batch import ForwardBatch, ForwardEngine, ForwardOutput
from minisrv.engine.page_table import PageTable, token_positions
from minisrv.kvcache.manager import KVCacheManager
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.scheduler import Scheduler
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import (
    SCHEDULER_INBOX,
    AnswerMsg,
    DetokenizeMsg,
    Finish,
    GenerateMsg,
    Message,
    StatsMsg,
)

PAGE_SIZE, MAX_SEQ_LEN, VOCAB_SIZE, MAX_PREFILL_TOKENS = 16, 2048, 32_000, 8192
EOS_ID = VOCAB_SIZE  # never sampled: outputs end at their limit, but the check still runs
TARGETS_US = {1: 150, 64: 250, 256: 400}


class StubEngine:
    """Computes the indices that a device needs, and makes up the tokens."""

    def __init__(self, num_rows: int) -> None:
        self.page_table = PageTable(num_rows, MAX_SEQ_LEN, PAGE_SIZE)

    def launch(self, batch: ForwardBatch) -> ForwardOutput:
        """See ForwardEngine."""
        self.page_table.apply(batch)
        self.page_table.slots(batch, token_positions(batch))
        ends = batch.start_positions + batch.query_lens
        return ForwardOutput(ends[batch.sample_indices] % np.int32(VOCAB_SIZE))

    def wait(self, handle: ForwardOutput) -> ForwardOutput:
        """See ForwardEngine."""
        return handle


class FrameChannel:
    """Keeps frames in memory, decoded and encoded as on a socket."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []
        self.outbox: list[bytes] = []

    def receive(self, wait: bool) -> list[Message]:
        """As ZmqChannel."""
        frames, self.inbox = self.inbox, []
        return [decode(frame, SCHEDULER_INBOX) for frame in frames]

    def begins_epoch(self) -> bool:
        """As ZmqChannel."""
        return False

    def send(self, message: DetokenizeMsg) -> None:
        """As ZmqChannel."""
        self.outbox.append(encode(message))

    def send_to_frontend(self, message: AnswerMsg | StatsMsg) -> None:
        """As ZmqChannel."""
        encode(message)


@dataclass
class Clients:
    """Keeps `batch` requests open; asserts that each gets exactly the number of tokens it wants."""

    channel: FrameChannel
    batch: int
    rng: Random = field(default_factory=lambda: Random(0))
    wanted: dict[int, int] = field(default_factory=dict)
    num_finished: int = 0
    _prefixes: list[list[int]] = field(default_factory=list)
    _uid: int = 0

    def send(self) -> None:
        """Send at most one request per step, so that requests join as others end."""
        if len(self.wanted) >= self.batch:
            return
        if len(self._prefixes) < 8:
            self._prefixes.append(self._tokens(200))
        shared = self.rng.choice([[], *self._prefixes])
        prompt = shared + self._tokens(self.rng.randint(100, 300))
        sampling = SamplingParams(
            temperature=0.7,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            max_tokens=self.rng.randint(50, 500),
            stop_token_ids=(VOCAB_SIZE + 1,),
        )
        self._uid += 1
        assert sampling.max_tokens is not None
        self.wanted[self._uid] = sampling.max_tokens
        message = GenerateMsg(
            uid=self._uid, prompt_ids=np.array(prompt, np.int32), sampling=sampling
        )
        self.channel.inbox.append(encode(message))

    def receive(self) -> None:
        """Count the tokens that have arrived."""
        frames, self.channel.outbox = self.channel.outbox, []
        for frame in frames:
            message = decode(frame, (DetokenizeMsg,))
            assert isinstance(message, DetokenizeMsg)
            assert not message.failures
            for uid, finish in zip(message.uids.tolist(), message.finishes.tolist(), strict=True):
                self.wanted[uid] -= 1
                if finish != Finish.NONE:
                    assert self.wanted.pop(uid) == 0
                    self.num_finished += 1

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB_SIZE) for _ in range(count)]


@dataclass
class Timings:
    """Microseconds of the steps that only decode, and of those that also have prompt chunks."""

    batch: int
    decodes: list[float] = field(default_factory=list)
    mixed: list[float] = field(default_factory=list)

    def line(self) -> str:
        """This batch size's row of the table."""
        median, target = statistics.median(self.decodes), TARGETS_US[self.batch]
        p99 = statistics.quantiles(self.decodes, n=100)[98]
        mixed = statistics.median(self.mixed) if self.mixed else float("nan")
        met = "met" if median <= target else "missed"
        return f"| {self.batch} | {median:.0f} | {p99:.0f} | {target}, {met} | {mixed:.0f} |"


def make_loop(batch: int, engine: ForwardEngine, channel: FrameChannel) -> SchedulerLoop:
    """A loop for `batch` running requests."""
    num_pages = batch * MAX_SEQ_LEN // PAGE_SIZE
    scheduler = Scheduler(
        KVCacheManager(num_pages, batch, PAGE_SIZE, radix_cache=True),
        max_seq_len=MAX_SEQ_LEN,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        eos_ids=[EOS_ID],
        new_seed=lambda: 1,
    )
    return SchedulerLoop(scheduler, engine, channel, overlap_depth=1)


def run(batch: int, steps: int) -> tuple[Timings, Clients]:
    """Time `steps` decode steps with `batch` open requests, after a warm-up."""
    channel = FrameChannel()
    loop = make_loop(batch, StubEngine(batch), channel)
    scheduler = loop.scheduler
    clients, timings = Clients(channel, batch), Timings(batch)
    warm_up = 2 * batch + 20
    gc.disable()
    while warm_up or len(timings.decodes) < steps:
        clients.send()
        num_prefilled = _num_admitted(scheduler)
        began = time.perf_counter()
        loop.turn()
        took = (time.perf_counter() - began) * 1e6
        clients.receive()
        if warm_up:
            warm_up -= 1
            continue
        kind = timings.mixed if _num_admitted(scheduler) != num_prefilled else timings.decodes
        kind.append(took)
    gc.enable()
    return timings, clients


def _num_admitted(scheduler: Scheduler) -> int:
    return max((request.arrival for request in scheduler.running), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    header = "| batch | median us | p99 us | target us | with a prompt, median us |"
    header += "\n|---|---|---|---|---|"
    lines = [run(batch, args.steps)[0].line() for batch in TARGETS_US]
    table = "\n".join([header, *lines])
    print(table)
    if args.results:
        args.results.write_text(
            f"# Host time of a decode step, {date.today()}\n\n"
            f"`python benchmark/micro/host_step.py`: medians of {args.steps} steps. "
            f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}.\n\n"
            f"{table}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
