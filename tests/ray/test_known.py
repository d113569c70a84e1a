"""What the router of minisrv.ray knows, without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from minisrv.ray.autoscaling import QUEUED_TOKENS, QueuedTokensPolicy
from minisrv.ray.known import FIRST_RATE, Known
from minisrv.ray.prompts import BLOCK_TOKENS, prompt_of

SYSTEM = {"role": "system", "content": "You are terse. " * 40}


def chat(*contents: str, **fields: object) -> bytes:
    messages = [SYSTEM, *({"role": "user", "content": content} for content in contents)]
    return json.dumps({"messages": messages, **fields}).encode()


def shared(first: bytes, second: bytes) -> int:
    """How many blocks two requests have in common at their beginning."""
    pairs = zip(prompt_of(first).blocks, prompt_of(second).blocks, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt_of(first).blocks))


def test_requests_with_the_same_beginning_share_blocks() -> None:
    whole = 600 // 4 // BLOCK_TOKENS
    assert shared(chat("Hi"), chat("Ho", temperature=0.5, stream=True)) == whole
    longer = chat("Hi", "And then? " * 100)
    assert shared(longer, chat("Hi", "And then? " * 100, "More")) > whole
    assert shared(chat("Hi"), chat("Hi", cache_salt="tenant")) == 0
    assert shared(chat("Hi"), chat("Hi", tools=[{"type": "function"}])) == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b'{"messages": 3}', b'{"prompt": ""}', b"[" * 10**5]
)
def test_a_body_without_a_prompt_has_no_blocks_that_matter(body: bytes) -> None:
    assert prompt_of(body).num_tokens <= 1


@pytest.mark.parametrize("name", ["prompt", "input", "text"])
def test_every_form_of_a_prompt_is_read(name: str) -> None:
    text = "\N{SNOWMAN} and more " * 50
    prompt = prompt_of(json.dumps({name: text}).encode())
    assert prompt.num_tokens == -(-len(text.encode()) // 4)
    ids = prompt_of(json.dumps({"prompt": list(range(500))}).encode())
    assert ids.num_tokens > 100


def test_a_queue_becomes_shorter_at_the_measured_rate_until_the_next_report() -> None:
    known = Known(0)
    known.add(3000, now=10.0)
    assert known.load(10.0).queued_tokens == 3000
    assert known.load(11.0).queued_tokens == 3000 - FIRST_RATE
    report = {"at": 12.0, "num_queued_tokens": 800, "prefill_tokens_per_s": 400.0}
    known.take_report(report)
    assert known.load(13.0).queued_tokens == 400
    known.take_report(report)  # the same one again
    assert known.load(14.0).queued_tokens == 0
    known.take_report({**report, "at": 14.0, "prefill_tokens_per_s": 0.0})
    assert known.load(14.0).prefill_rate == FIRST_RATE


def test_what_was_sent_after_a_report_is_added_to_it() -> None:
    known = Known(0)
    known.add(500, now=11.0)
    known.add(300, now=12.5)
    known.take_report({"at": 12.0, "num_queued_tokens": 800, "prefill_tokens_per_s": 400.0})
    assert known.load(12.0).queued_tokens == 800 + 300
    known.take_report({"at": 13.0, "num_queued_tokens": 100, "prefill_tokens_per_s": 400.0})
    assert known.load(13.0).queued_tokens == 100
    assert not known.sent


def test_a_prompt_that_goes_elsewhere_is_taken_back() -> None:
    known = Known(0)
    known.add(500, now=11.0)
    known.add(300, now=11.0)
    known.take_back(500, sent_at=11.0)
    assert known.load(11.0).queued_tokens == 300
    known.take_report({"at": 10.0, "num_queued_tokens": 100, "prefill_tokens_per_s": 400.0})
    assert known.load(10.0).queued_tokens == 100 + 300
    known.take_report({"at": 12.0, "num_queued_tokens": 0, "prefill_tokens_per_s": 400.0})
    known.take_back(300, sent_at=11.0)  # the report has it no more
    assert known.load(12.0).queued_tokens == 0


def test_a_scheduler_that_was_started_again_has_lost_its_cache() -> None:
    known = Known(0)
    assert not known.take_report({"at": 1.0, "restarts": 0})
    assert known.take_report({"at": 2.0, "restarts": 1})
    assert not known.take_report({"at": 2.0, "restarts": 1}), "the same one again"
    assert not known.take_report({"at": 3.0, "restarts": 1})


def test_ray_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys, minisrv.asgi, minisrv.commands.cli, minisrv.ray, minisrv.ray.prompts;"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_replicas_follow_queued_tokens_or_open_requests_whichever_need_more() -> None:
    policy = QueuedTokensPolicy(target_queued_tokens=1000)

    def wanted(queued: dict[str, float], requests: float) -> float:
        config = SimpleNamespace(target_ongoing_requests=32)
        metrics = {QUEUED_TOKENS: queued} if queued else {}
        context = SimpleNamespace(
            aggregated_metrics=metrics, total_num_requests=requests, config=config
        )
        return policy(context)[0]

    assert wanted({"a": 500, "b": 3000}, requests=8) == 3.5
    assert wanted({"a": 500}, requests=64) == 2
    assert wanted({}, requests=16) == 0.5
