"""Short ways to make what many tests need."""

from __future__ import annotations

from collections.abc import Sequence
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
from minisrv.structured_output.vocabulary import LIMITS, Vocabulary
from minisrv.wire.messages import GenerateMsg
from tests.support.hash_engine import HashEngine

DEMO_EOS = 2
GREEDY = SamplingParams(temperature=0.0)


def generate_msg(
    uid: int, prompt: Sequence[int], cache_salt: str = "", **sampling: Any
) -> GenerateMsg:
    params = SamplingParams(**{"temperature": 0.0, **sampling}).with_defaults(GREEDY)
    return GenerateMsg(
        uid=uid,
        prompt_ids=np.asarray(prompt, np.int32),
        sampling=params,
        cache_salt=cache_salt,
    )


def hash_loop(
    *,
    num_pages: int = 16,
    page_size: int = 2,
    num_rows: int = 4,
    budget: int = 8,
    depth: int = 0,
    radix_cache: bool = True,
    vocab_size: int = 50,
    eos_ids: Sequence[int] = (),
    compiler: GrammarCompiler | None = None,
) -> SchedulerLoop:
    """The real loop and scheduler on a hash engine, driven by hand with `turn`."""
    max_seq_len = num_pages * page_size
    engine = HashEngine(
        num_pages=num_pages,
        page_size=page_size,
        num_rows=num_rows,
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
        lazy=depth == 1,
    )
    scheduler = Scheduler(
        KVCacheManager(num_pages, num_rows, page_size, radix_cache=radix_cache),
        max_seq_len=max_seq_len,
        max_prefill_tokens=budget,
        eos_ids=eos_ids,
        new_seed=lambda: 0,
    )
    return SchedulerLoop(scheduler, engine, LocalChannel(), depth, compiler)


def demo_vocabulary(limits: LLParserLimits = LIMITS) -> Vocabulary:
    """The demo model's 512 tokens; DEMO_EOS ends a text."""
    return Vocabulary(demo_tokenizer(), 512, [DEMO_EOS], limits)


def demo_tokenizer() -> HFTokenizer:
    return load_tokenizer(Path(minisrv.__file__).parent / "checkpoint" / "demo_model")
