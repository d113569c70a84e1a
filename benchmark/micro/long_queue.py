"""What a long queue costs each decode step: python benchmark/micro/long_queue.py [--steps N].

Times the scheduler's `schedule` and `settle` of steps that decode for a few requests, whose prompts
share 32,000 tokens, while others wait for more pages than there are. The waiting requests share
that prefix too, or nothing. Between the steps the cache stays as it is; or a page is evicted, as
when a decode needs one and none is free; or pages are pinned and unpinned, as when a request begins
and another ends.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time

import numpy as np

from minisrv.kvcache.manager import KVCacheManager
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.scheduler import Scheduler
from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import GenerateMsg

PAGE_SIZE, VOCAB_SIZE = 16, 32_000
PREFIX, CACHED, TAIL = 32_000, 24_000, 32_000  # tokens; a tail does not fit beside the prefix
NUM_RUNNING, WAITING = 8, (0, 1, 64, 256)
NUM_PAGES = (PREFIX + CACHED) // PAGE_SIZE + 200
EVENTS = ("nothing", "eviction", "pins")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    print("Median (minimum) in us per step, by what happens between the steps")
    print(f"| waiting | sharing | {' | '.join(EVENTS)} |\n|---|---|{'---|' * len(EVENTS)}")
    for num_waiting in WAITING:
        for shared in (True, False) if num_waiting else (True,):
            times = [measure(num_waiting, steps, event, shared=shared) for event in EVENTS]
            cells = " | ".join(f"{statistics.median(took):.0f} ({min(took):.0f})" for took in times)
            print(f"| {num_waiting} | {f'{PREFIX:,} tokens' if shared else 'nothing'} | {cells} |")
    return 0


def measure(num_waiting: int, steps: int, event: str, *, shared: bool) -> list[float]:
    """Microseconds of `schedule` and `settle` in each of `steps` steps."""
    scheduler = Scheduler(
        KVCacheManager(NUM_PAGES, 512, PAGE_SIZE, radix_cache=True),
        max_seq_len=PREFIX + TAIL + 1,
        max_prefill_tokens=8192,
        eos_ids=[],
        new_seed=lambda: 1,
    )
    rng = np.random.default_rng(0)

    def tokens(count: int) -> Int32Array:
        return rng.integers(0, VOCAB_SIZE, count, np.int32)

    cache, prefix, cached = scheduler.cache, tokens(PREFIX), tokens(CACHED)
    add(scheduler, 0, cached, 1)
    while scheduler.num_open:
        step(scheduler)
    for uid in range(1, NUM_RUNNING + 1):
        add(scheduler, uid, np.concatenate([prefix, tokens(20)]), 10_000)
    while len(scheduler.running) < NUM_RUNNING or any(r.prefilling for r in scheduler.running):
        step(scheduler)
    for uid in range(100, 100 + num_waiting):
        head = prefix if shared else tokens(PREFIX)
        add(scheduler, uid, np.concatenate([head, tokens(TAIL)]), 1)
    step(scheduler)
    gc.disable()
    took = []
    for _ in range(steps):
        if event == "eviction":
            cache.evict(1)
        elif event == "pins":
            lease = cache.open_lease()
            cache.extend_match(lease, cached, 0, -1)
            cache.close_lease(lease, cached, 0)
        took.append(step(scheduler))
    gc.enable()
    assert len(scheduler.waiting) == num_waiting
    assert len(scheduler.running) == NUM_RUNNING
    return took


def add(scheduler: Scheduler, uid: int, prompt: Int32Array, max_tokens: int) -> None:
    sampling = SamplingParams(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=max_tokens, ignore_eos=True
    )
    scheduler.add_request(GenerateMsg(uid=uid, prompt_ids=prompt, sampling=sampling), 0.0)


def step(scheduler: Scheduler) -> float:
    """Plan a step and settle it with made-up tokens; returns how long that took."""
    began = time.perf_counter()
    plan = scheduler.schedule(0.0)
    assert plan is not None
    planned = time.perf_counter()
    token_ids = [1] * len(plan.samples)
    settling = time.perf_counter()
    scheduler.settle(plan, token_ids, 0.0)
    ended = time.perf_counter()
    scheduler.take_replies()
    return (planned - began + ended - settling) * 1e6


if __name__ == "__main__":
    sys.exit(main())
