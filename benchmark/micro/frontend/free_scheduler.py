"""The real scheduler process around an engine that costs nothing.

Runs under the supervisor in place of the scheduler. Each step lasts as many microseconds as the
largest `seed` of its requests, and each token is the letter a.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from minisrv.checkpoint.model_config import load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.kvcache.manager import KVCacheManager
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.zmq_channel import ZmqChannel
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady

NUM_PAGES, NUM_ROWS, PAGE_SIZE = 4096, 256, 16


class FreeEngine:
    """Implements ForwardEngine."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id
        self._due = 0.0

    def launch(self, batch: ForwardBatch) -> ForwardOutput:
        """See ForwardEngine."""
        period_s = int(batch.sampling.seeds.max(initial=0)) * 1e-6
        time.sleep(max(0.0, self._due - time.perf_counter()))
        self._due = max(self._due + period_s, time.perf_counter())
        return ForwardOutput(np.full(batch.sample_indices.size, self._token_id, np.int32))

    def wait(self, handle: ForwardOutput) -> ForwardOutput:
        """See ForwardEngine."""
        return handle


def _serve(child: Child) -> None:
    model = load_model_config(child.boot.model_dir, child.config.max_seq_len)
    tokenizer = load_tokenizer(Path(child.boot.tokenizer_dir), None)
    channel = ZmqChannel(Path(child.boot.run_dir), child.boot.epoch)
    child.handle_notices(channel.take_notice)
    scheduler = Scheduler(
        KVCacheManager(NUM_PAGES, NUM_ROWS, PAGE_SIZE, radix_cache=True),
        max_seq_len=model.max_seq_len,
        max_prefill_tokens=8192,
        eos_ids=model.eos_token_ids,
        new_seed=lambda: 0,
    )
    facts = {
        "max_seq_len": model.max_seq_len,
        "vocab_size": model.vocab_size,
        "sampling_defaults": {"temperature": 0.0},
        "sampling_source": "generation_config.json",
        "unapplied_defaults": [],
        "notes": [],
        "placement": "no model",
        "memory_plan": "none",
    }
    child.report(ChildReady(facts))
    engine = FreeEngine(tokenizer.encode("a")[-1])
    record = child.open_progress()
    SchedulerLoop(scheduler, engine, channel, 0, progress=record).run(lambda: None)


if __name__ == "__main__":
    run_child("scheduler", _serve)
