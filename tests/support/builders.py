"""Builders of what many tests need, with defaults for what does not matter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLParserLimits

import minisrv
from minisrv.checkpoint.tokenizer import HFTokenizer, load_tokenizer
from minisrv.kvcache.manager import KVCacheManager
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.scheduler import Scheduler
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.structured_output.sandbox import Sandbox
from minisrv.structured_output.vocabulary import Vocabulary, read_vocabulary
from minisrv.wire.messages import GenerateMsg
from tests.support.hash_engine import HashEngine

DEMO_EOS = 2
GREEDY = SamplingParams(temperature=0.0)


def generate_msg(
    uid: int, prompt: Sequence[int], cache_salt: str = "", *, key: int = 0, **sampling: Any
) -> GenerateMsg:
    params = SamplingParams(**{"temperature": 0.0, **sampling}).with_defaults(GREEDY)
    return GenerateMsg(
        uid=uid,
        prompt_ids=np.asarray(prompt, np.int32),
        sampling=params,
        cache_salt=cache_salt,
        key=key,
    )


def make_scheduler(
    *,
    num_pages: int = 16,
    page_size: int = 2,
    num_rows: int = 4,
    budget: int = 8,
    radix_cache: bool = True,
    eos_ids: Sequence[int] = (),
    fair_keys: bool = False,
) -> Scheduler:
    """A scheduler whose context is what its cache holds."""
    return Scheduler(
        KVCacheManager(num_pages, num_rows, page_size, radix_cache=radix_cache),
        max_seq_len=num_pages * page_size,
        max_prefill_tokens=budget,
        eos_ids=eos_ids,
        new_seed=lambda: 0,
        fair_keys=fair_keys,
    )


def hash_loop(
    *,
    depth: int = 0,
    vocab_size: int = 50,
    compiler: GrammarCompiler | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> SchedulerLoop:
    """The real loop and scheduler on a hash engine, driven by hand with `turn`.

    options: those of `make_scheduler`.
    """
    scheduler = make_scheduler(**options)
    engine = HashEngine(
        num_pages=scheduler.cache.pages.size,
        page_size=scheduler.cache.page_size,
        num_rows=scheduler.cache.rows.size,
        max_seq_len=scheduler.max_seq_len,
        vocab_size=vocab_size,
        lazy=depth == 1,
    )
    return SchedulerLoop(scheduler, engine, LocalChannel(), depth, compiler, clock=clock)


def demo_vocabulary(limits: LLParserLimits | None = None) -> Vocabulary:
    """The demo model's 512 tokens; DEMO_EOS ends a text."""
    return Vocabulary(read_vocabulary(demo_tokenizer(), 512, [DEMO_EOS]), limits)


@cache
def demo_sandbox() -> Sandbox:
    """One helper process for all tests of a run; it ends with them."""
    return Sandbox(demo_vocabulary().source)


def demo_tokenizer() -> HFTokenizer:
    return load_tokenizer(Path(minisrv.__file__).parent / "checkpoint" / "demo_model")
