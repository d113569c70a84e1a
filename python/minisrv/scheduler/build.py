"""Put engine, cache, scheduler and loop together, the same for a server and for offline use."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.errors import MinisrvError
from minisrv.kvcache.manager import KVCacheManager
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.channel import Channel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.stats import LoopStats
from minisrv.start_progress import ReportProgress
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.structured_output.sandbox import Sandbox
from minisrv.structured_output.vocabulary import Vocabulary
from minisrv.supervision.progress import Progress
from minisrv.wire.messages import GenerateMsg

logger = logging.getLogger("minisrv.scheduler")

WARM_UP = SamplingParams(
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    max_tokens=2,
    ignore_eos=True,
)


def build_loop(
    config: ServerConfig,
    model_dir: Path,
    channel: Channel,
    progress: ReportProgress,
    run_dir: Path | None = None,
    vocabulary: Vocabulary | MinisrvError | None = None,
    model_config: ModelConfig | None = None,
    record: Progress | None = None,
) -> SchedulerLoop:
    """Load the model and make a loop that is ready to turn.

    run_dir: where tensor-parallel ranks meet; by default a directory of their own.
    vocabulary: for structured output; without it there is none. model_config: that of model_dir,
    which is read if it is None. record: where the loop reports what it does, for the supervisor.
    The context is the model's or --max-seq-len, and no more than the cache holds.
    Raises ConfigError for an unusable checkpoint or option, or too little memory.
    """
    if model_config is None:
        model_config = load_model_config(model_dir, config.max_seq_len)
    engine = Engine(config, model_dir, model_config, progress, run_dir)
    capacity = engine.num_pages * config.page_size
    if capacity < engine.max_seq_len:
        logger.warning(
            "the cache holds %d tokens, less than the context of %d: longer requests are refused; "
            "raise --kv-memory or --num-pages",
            capacity,
            engine.max_seq_len,
        )
    cache = KVCacheManager(
        engine.num_pages,
        config.max_running_requests,
        config.page_size,
        radix_cache=config.radix_cache,
    )
    scheduler = Scheduler(
        cache,
        max_seq_len=min(engine.max_seq_len, capacity),
        max_prefill_tokens=engine.max_prefill_tokens,
        eos_ids=model_config.eos_token_ids,
        new_seed=lambda: secrets.randbits(63),
        fair_keys=config.fair_keys,
    )
    compiler: GrammarCompiler | MinisrvError | None = None
    if isinstance(vocabulary, Vocabulary):
        limits = (config.grammar_cpu_s, config.grammar_memory_mib)
        compiler = GrammarCompiler(vocabulary, Sandbox(vocabulary.source, *limits))
    else:
        compiler = vocabulary
    loop = SchedulerLoop(scheduler, engine, channel, engine.overlap_depth, compiler, record)
    progress("warm-up", 0.0)
    _warm_up(loop, engine.warm_up_lens)
    progress("warm-up", 1.0)
    return loop


def _warm_up(loop: SchedulerLoop, lens: Sequence[int]) -> None:
    """Serve prompts of these lengths one by one, so that no user waits for one-time work."""
    longest = loop.scheduler.max_seq_len - 2
    for length in sorted({min(length, longest) for length in lens if longest > 0}):
        prompt = np.zeros(length, np.int32)
        loop.scheduler.add_request(GenerateMsg(uid=-1, prompt_ids=prompt, sampling=WARM_UP), 0.0)
        while loop.busy:
            loop.advance()
        # Otherwise the next prompt would find its beginning in the cache.
        loop.scheduler.cache.evict(loop.scheduler.cache.pages.size)
    loop.scheduler.take_replies()
    loop.stats = LoopStats(loop.scheduler.num_admitted)
