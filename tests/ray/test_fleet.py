"""A fleet on Ray Serve under load: the cost router, deaths and updates, latency of the ingress.

FLEET_TRACE names a trace in Mooncake's form; FLEET_TRACE_S, FLEET_SPEED, FLEET_CHAOS_S and
FLEET_KILL_EVERY_S say how long a run is.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.ray import conversations
from tests.ray.fleet import Answer, Fleet, ask, fleet, replica_processes
from tests.support.server_process import wait_until, write_model_dir

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.soak

NUM_REPLICAS = 8
LOAD = 0.8  # of what the replicas could compute without a cache
CHAOS_S = float(os.environ.get("FLEET_CHAOS_S", "300"))
KILL_EVERY_S = float(os.environ.get("FLEET_KILL_EVERY_S", "60"))
NUM_CLIENTS = 12


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = write_model_dir(tmp_path / "bytes")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_position_embeddings": conversations.MAX_SEQ_LEN}))
    return directory


def test_the_cost_router_finds_more_in_caches_than_power_of_two(
    tmp_path: Path, model_dir: Path
) -> None:
    trace = conversations.arrivals()
    num_tokens = sum(len(one.prompt) for one in trace)
    token_s = LOAD * NUM_REPLICAS * trace[-1].at_s / num_tokens
    print(f"\n{len(trace)} requests with {num_tokens} tokens in {trace[-1].at_s:.0f} s")
    figures = {}
    with fleet(tmp_path, model_dir, free_token_s=token_s, step_s=0.002) as one:
        for router in ("power-of-two", "cost"):
            one.deploy(num_replicas=NUM_REPLICAS, router=router)
            answers = asyncio.run(play(one, trace, router))
            one.remove()
            figures[router] = hit_rate, ttft = summary(answers)
            p50, p90, p99 = np.percentile(ttft, (50, 90, 99))
            print(f"{router}: hit rate {hit_rate:.1%}, TTFT {p50:.2f} / {p90:.2f} / {p99:.2f} s")
        sent = Counter(request_id for request_id, _, _ in one.notes("sent"))
    assert len(sent) == 2 * len(trace)
    assert set(sent.values()) == {1}, "a request was repeated"
    assert figures["cost"][0] >= 2.5 * figures["power-of-two"][0]
    assert np.median(figures["cost"][1]) <= 0.6 * np.median(figures["power-of-two"][1])


async def play(one: Fleet, trace: list[conversations.Arrival], name: str) -> list[Answer]:
    """Send each request at its time."""
    start = time.monotonic() + 1

    async def send(number: int, arrival: conversations.Arrival) -> Answer:
        body = {
            "prompt": arrival.prompt,
            "max_tokens": arrival.num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await asyncio.sleep(start + arrival.at_s - time.monotonic())
        return await ask(one.port, f"{name}-{number}", body)

    return await asyncio.gather(*itertools.starmap(send, enumerate(trace)))


def summary(answers: list[Answer]) -> tuple[float, list[float]]:
    """The hit rate, and the seconds to the first token of each."""
    bad = [(answer.fault, answer.reply.status) for answer in answers if answer.fault]
    assert not bad, bad[:5]
    assert {answer.reply.status for answer in answers} == {200}
    usages = [answer.events()[-1]["usage"] for answer in answers]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    total = sum(usage["prompt_tokens"] for usage in usages)
    return cached / total, [answer.ttft_s for answer in answers]


def test_no_request_is_lost_over_deaths_fewer_replicas_and_an_update(
    tmp_path: Path, model_dir: Path
) -> None:
    with fleet(tmp_path, model_dir, step_s=0.01) as one:
        one.deploy(num_replicas=5)
        families = [psutil.Process().children(recursive=True)]
        outcomes, num_kills = asyncio.run(endure(one))
        families.append(psutil.Process().children(recursive=True))
    print(f"\n{num_kills} kills, 2 scale-downs, 1 update in {CHAOS_S:.0f} s: {dict(outcomes)}")
    assert num_kills >= 3
    assert outcomes.keys() <= {"completed", "refused", "ended with an error event"}
    assert outcomes["completed"] > 20 * num_kills
    _, alive = psutil.wait_procs(set(itertools.chain(*families)), timeout=20)
    assert not alive


async def endure(one: Fleet) -> tuple[Counter[str], int]:
    """What became of the requests, and how many replicas were killed."""
    prompts = [f"{number} and so on" for number in range(8)]
    bodies = [{"prompt": p, "max_tokens": 120, "ignore_eos": True} for p in prompts]
    whole = [await ask(one.port, f"first-{i}", body) for i, body in enumerate(bodies)]
    texts = [answer.reply.json()["choices"][0]["text"] for answer in whole]
    outcomes, ended = Counter[str](), asyncio.Event()
    rng = random.Random(0)

    async def client(number: int) -> None:
        for turn in itertools.count():
            if ended.is_set():
                return
            choice = rng.randrange(len(bodies))
            body: dict[str, Any] = {**bodies[choice], "stream": bool(rng.randrange(4))}
            answer = await ask(one.port, f"{number}-{turn}", body)
            outcomes[outcome(answer, texts[choice])] += 1

    async def kill() -> int:
        killed = 0
        while True:
            try:
                await asyncio.wait_for(ended.wait(), KILL_EVERY_S)
                return killed
            except TimeoutError:
                rng.choice(replica_processes()).kill()
                killed += 1

    async with asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            group.create_task(client(number))
        kills = group.create_task(kill())
        changes: list[dict[str, Any]] = [{"num_replicas": 4}, {"num_replicas": 3}]
        changes.append({"num_replicas": 3, "max_open_requests": 500})
        start = time.monotonic()
        for number, change in enumerate(changes, 1):
            await asyncio.sleep(start + number * CHAOS_S / 4 - time.monotonic())
            await asyncio.to_thread(deploy_until_done, one, change)
        await asyncio.sleep(start + CHAOS_S - time.monotonic())
        ended.set()
    return outcomes, kills.result()


def deploy_until_done(one: Fleet, change: dict[str, Any]) -> None:
    """Ray gives an update up if a replica of the new version dies while it starts."""
    for _ in range(3):
        with contextlib.suppress(RuntimeError):
            return one.deploy(**change)
    raise AssertionError("Ray has given up three times")


def outcome(answer: Answer, text: str) -> str:
    """What became of a request whose whole text is known."""
    reply = answer.reply
    if answer.fault:
        return f"{answer.fault} (status {reply.status})"
    if reply.status in (429, 503) or (reply.status == 500 and b'"engine_dead"' in reply.body):
        return "refused"
    if reply.status != 200:
        return f"status {reply.status}: {reply.body[:200]!r}"
    if not reply.is_stream:
        same = reply.json()["choices"][0]["text"] == text
        return "completed" if same else "another text"
    if reply.events[-1:] != ["[DONE]"]:
        return "a stream without an end"
    events = answer.events()
    got = "".join(event["choices"][0]["text"] for event in events if "choices" in event)
    if "error" in events[-1]:
        return "ended with an error event" if text.startswith(got) else "another text"
    return "completed" if got == text else "another text"


def test_latency_that_ray_adds_to_a_chunk_of_one_stream(tmp_path: Path, model_dir: Path) -> None:
    with fleet(tmp_path, model_dir, step_s=0.02) as one:
        one.deploy(num_replicas=1)
        body = {"prompt": "go on", "max_tokens": 500, "ignore_eos": True, "stream": True}
        asyncio.run(ask(one.port, "warm", body))
        answer = asyncio.run(ask(one.port, "watched", body))
        written = [note[1:] for note in one.notes("piece") if note[0] == "watched"]
    sizes, written_at = zip(*written, strict=True)
    assert len(answer.ends_at) > 0.9 * len(written), "pieces are joined"
    # A piece may hold several; it can come when the last of them has been written.
    last = np.searchsorted(np.cumsum(sizes), answer.ends_at)
    added = 1000 * (np.array(answer.pieces_at) - np.array(written_at)[last])
    p50, p99 = np.percentile(added, (50, 99))
    print(f"\nfrom the replica to the client: {p50:.2f} ms at p50, {p99:.2f} ms at p99")
    assert 0 < p50 < 50


def test_more_replicas_start_when_tokens_are_queued(tmp_path: Path, model_dir: Path) -> None:
    scaling = {"target_queued_tokens": 500, "target_ongoing_requests": 1000}
    with fleet(tmp_path, model_dir, free_token_s=0.002) as one:
        one.deploy(num_replicas=1, max_replicas=2, upscale_delay_s=1, **scaling)
        assert len(replica_processes()) == 1
        body = {"prompt": [100] * 8000, "max_tokens": 1}

        async def load() -> list[Answer]:
            bodies = [{**body, "prompt": [100 + i] * 8000} for i in range(4)]
            return await asyncio.gather(*(ask(one.port, f"{i}", b) for i, b in enumerate(bodies)))

        answers = asyncio.run(load())
        assert {answer.reply.status for answer in answers} == {200}
        wait_until(lambda: len(replica_processes()) == 2)
