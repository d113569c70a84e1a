"""What the cost router on Ray remembers of its choices, without a cluster."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from minisrv.ray.prompts import prompt_of

pytest.importorskip("ray.serve")

from minisrv.ray.request_router import CostRequestRouter


def replica(name: str) -> Any:
    stats = {"at": time.time(), "ready": True, "num_queued_tokens": 0}
    return SimpleNamespace(replica_id=name, routing_stats=stats)


def request(name: str, text: str) -> Any:
    prompt = prompt_of(text.encode())
    call = {"prompt": (prompt.blocks, prompt.num_tokens, prompt.block_tokens, "")}
    return SimpleNamespace(
        args=[call],
        metadata=SimpleNamespace(internal_request_id=name),
        routing_context=SimpleNamespace(),
    )


def test_a_choice_that_is_made_again_counts_once_and_its_prompt_is_not_cached_yet() -> None:
    router = CostRequestRouter.__new__(CostRequestRouter)
    router.initialize_state()
    asked = request("a", '{"prompt": "' + "word " * 4000 + '"}')
    one = replica("one")
    asyncio.run(router.choose_replicas([one], asked))
    known = router._known[one.replica_id]
    first = known.load(known.at).queued_tokens
    assert first > 4000
    asyncio.run(router.choose_replicas([one], asked))  # as Ray does when no replica took it
    assert known.load(known.at).queued_tokens == pytest.approx(first, rel=0.1)
