"""The scheduler process: the engine inside, and the loop that feeds it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from minisrv.checkpoint.end_tokens import add_end_token
from minisrv.checkpoint.model_config import load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.errors import MinisrvError
from minisrv.scheduler.facts import model_facts
from minisrv.scheduler.tree_feed import TreeFeed
from minisrv.scheduler.zmq_channel import ZmqChannel
from minisrv.structured_output.vocabulary import Vocabulary, open_vocabulary
from minisrv.supervision.child_main import Child, end_start, run_child
from minisrv.supervision.records import ChildReady

logger = logging.getLogger("minisrv.scheduler")


def main() -> None:
    run_child("scheduler", _serve)


def _serve(child: Child) -> None:
    model_dir, run_dir = Path(child.boot.model_dir), Path(child.boot.run_dir)
    model = load_model_config(model_dir, child.config.max_seq_len)
    tokenizer = load_tokenizer(Path(child.boot.tokenizer_dir))
    model = add_end_token(model, tokenizer)
    channel = ZmqChannel(run_dir, child.boot.epoch)
    child.handle_notices(channel.take_notice)
    vocabulary = open_vocabulary(tokenizer, model.vocab_size, model.eos_token_ids)
    del tokenizer  # some 25 MiB
    child.report_progress("import torch", 0.0)
    # It takes seconds: by now the lifeline holds, and a wrong config.json has been refused.
    from minisrv.engine.engine import Engine
    from minisrv.scheduler.build import build_loop

    loop = build_loop(
        child.config,
        model_dir,
        channel,
        child.report_progress,
        run_dir,
        vocabulary,
        model,
        child.open_progress(),
    )
    assert isinstance(loop.engine, Engine)
    if child.config.kv_events_endpoint is not None:
        loop.feed = TreeFeed(loop.scheduler.cache.tree, channel.kv_events)
    end_start()
    facts = model_facts(model, child.config, loop.scheduler.max_seq_len)
    facts |= {"placement": loop.engine.placement, "memory_plan": loop.engine.describe()}
    child.report(ChildReady(facts))
    if isinstance(vocabulary, Vocabulary):
        threading.Thread(target=_load, args=(vocabulary,), daemon=True).start()
    loop.run(loop.engine.check)


def _load(vocabulary: Vocabulary) -> None:
    """Load it before a grammar needs it, but after the start, which would take longer."""
    try:
        vocabulary.load()
    except MinisrvError as error:
        logger.warning("structured output is refused: %s", error)
