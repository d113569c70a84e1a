"""A scheduler process without torch: the real loop and scheduler over a hash engine.

MINISRV_TEST_STEP_S makes its steps slow, so that a test finds streams open. It is not ready
before there is a file MINISRV_TEST_GATE. With MINISRV_TEST_GRAMMARS it has structured output. With
MINISRV_TEST_POISONS a step with a prompt that begins with the token DEADLY_ID ends it, and one with
ENDLESS_ID does not end. With MINISRV_TEST_FREE_TOKEN_S it has a larger cache and a FreeEngine,
whose steps take so long for each token of a prompt.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.kvcache.manager import KVCacheManager
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.tree_feed import TreeFeed
from minisrv.scheduler.zmq_channel import ZmqChannel
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.structured_output.sandbox import Sandbox
from minisrv.structured_output.vocabulary import Vocabulary, open_vocabulary
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady
from tests.support.hash_engine import DEADLY_ID, ENDLESS_ID, HashEngine

STEP_S = float(os.environ.get("MINISRV_TEST_STEP_S", "0"))
GATE = os.environ.get("MINISRV_TEST_GATE", "")
POISONS = os.environ.get("MINISRV_TEST_POISONS") == "1"
GRAMMARS = os.environ.get("MINISRV_TEST_GRAMMARS") == "1"
FREE_TOKEN_S = float(os.environ.get("MINISRV_TEST_FREE_TOKEN_S", "0"))
NUM_PAGES = 6000 if FREE_TOKEN_S else 256
PAGE_SIZE = 16
MAX_PREFILL_TOKENS = 512 if FREE_TOKEN_S else 64
NUM_ROWS = 64
FREE_TOKEN = 97


class SlowHashEngine(HashEngine):
    def launch(self, batch: ForwardBatch) -> Any:
        time.sleep(STEP_S)
        if POISONS:
            first_ids = prompt_beginnings(batch)
            if DEADLY_ID in first_ids:
                os.abort()
            while ENDLESS_ID in first_ids:
                pass
        return super().launch(batch)


class FreeEngine:
    """A ForwardEngine that computes nothing: each token is FREE_TOKEN, after the time of a step."""

    def launch(self, batch: ForwardBatch) -> ForwardOutput:
        time.sleep(STEP_S + FREE_TOKEN_S * len(batch.prefill_ids))
        return ForwardOutput(np.full(len(batch.sample_indices), FREE_TOKEN, np.int32), None)

    def wait(self, handle: ForwardOutput) -> ForwardOutput:
        return handle


def prompt_beginnings(batch: ForwardBatch) -> list[int]:
    """The first tokens of the prompts that begin in this step."""
    lens = batch.query_lens[batch.num_decodes :]
    starts = batch.start_positions[batch.num_decodes :]
    first = np.cumsum(lens) - lens
    return batch.prefill_ids[first[starts == 0]].tolist()


def make_compiler(child: Child, model: ModelConfig) -> GrammarCompiler:
    tokenizer = load_tokenizer(Path(child.boot.tokenizer_dir))
    vocabulary = open_vocabulary(tokenizer, model.vocab_size, model.eos_token_ids)
    assert isinstance(vocabulary, Vocabulary)
    limits = (child.config.grammar_cpu_s, child.config.grammar_memory_mib)
    return GrammarCompiler(vocabulary, Sandbox(vocabulary.source, *limits))


def serve(child: Child) -> None:
    model = load_model_config(child.boot.model_dir, child.config.max_seq_len)
    channel = ZmqChannel(Path(child.boot.run_dir), child.boot.epoch)
    child.handle_notices(channel.take_notice)
    child.report_progress("weights", 0.5, 2**20, "B")
    while GATE and not Path(GATE).exists():
        time.sleep(0.01)
    num_rows = min(NUM_ROWS, child.config.max_running_requests)
    engine = (
        FreeEngine()
        if FREE_TOKEN_S
        else SlowHashEngine(
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            num_rows=num_rows,
            max_seq_len=model.max_seq_len,
            vocab_size=model.vocab_size,
            lazy=False,
        )
    )
    scheduler = Scheduler(
        KVCacheManager(NUM_PAGES, num_rows, PAGE_SIZE, radix_cache=True),
        max_seq_len=model.max_seq_len,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        eos_ids=model.eos_token_ids,
        new_seed=lambda: 0,
        fair_keys=child.config.fair_keys,
    )
    child.report_progress("weights", 1.0, 2**20, "B")
    facts = {
        "max_seq_len": model.max_seq_len,
        "vocab_size": model.vocab_size,
        "sampling_defaults": {"temperature": 0.0},
        "sampling_source": "generation_config.json",
        "unapplied_defaults": [],
        "notes": [],
        "placement": "hashes on cpu",
        "memory_plan": "a hash a slot",
    }
    compiler = make_compiler(child, model) if GRAMMARS else None
    child.report(ChildReady(facts))
    record = child.open_progress()
    loop = SchedulerLoop(scheduler, engine, channel, 0, compiler, record)
    if child.config.kv_events_endpoint is not None:
        loop.feed = TreeFeed(scheduler.cache.tree, channel.kv_events)
    loop.run(lambda: None)


run_child("scheduler", serve)
