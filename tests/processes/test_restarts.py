"""A process that dies is started again, and the requests go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from minisrv import FrontendManager
from minisrv.supervision.progress import _FIRST, _PLACE_ITEMS, _PLACES
from tests.processes.test_frontend_manager import expected_text as text_of_message
from tests.processes.test_frontend_manager import message
from tests.support.hash_engine import DEADLY_ID, ENDLESS_ID
from tests.support.server_process import (
    OpenRequest,
    ServerProcess,
    expected_text,
    open_requests,
    running,
    status_of,
    wait_until,
)

STEP_S = 0.02
NUM_TOKENS = 150
REAL = ("--model", "demo", "--dtype", "float32", "--num-threads", "1", "--tp", "2")
REAL += ("--kv-memory", "64MiB")


def metric(server: ServerProcess, name: str) -> float:
    """The sum of the samples of a metric."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"minisrv:{name}"))


def works(server: ServerProcess, name: str) -> bool:
    """Whether a process begins any work in the next tenth of a second."""
    (path,) = server.tmp_dir.glob(f"*/progress-{name}")
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        items = np.fromfile(path, np.int64)
        if any(items[_FIRST + place * _PLACE_ITEMS] for place in range(_PLACES)):
            return True
    return False


def text_of(request: OpenRequest) -> str:
    """The text of a whole reply or a stream, which must have ended as usual."""
    request.join()
    assert request.error is None
    assert request.status == 200, request.text
    if not request.events:
        return str(json.loads(request.text)["choices"][0]["text"])
    *chunks, done = request.events
    assert done == "[DONE]"
    assert '"error"' not in request.text
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize(
    "kind",
    ["scheduler", *(pytest.param(k, marks=pytest.mark.soak) for k in ("detokenizer", "tokenizer"))],
)
def test_requests_survive_the_death_of_a_process(
    kind: str, model_dir: Path, socket_dir: Path, gate: Path
) -> None:
    options: dict[str, Any] = {"tmp_dir": socket_dir, "step_s": STEP_S, "gate": gate}
    with running("--model", str(model_dir), **options) as server:
        requests = open_requests(server.url, num_streams=3, num_whole=2, max_tokens=NUM_TOKENS)
        gate.unlink()
        server.child(kind).kill()
        wait_until(lambda: status_of(f"{server.url}/ready") == 503)
        if kind == "scheduler":  # the others are back at once
            assert httpx.get(f"{server.url}/ready").json()["status"] == "restarting"
        assert status_of(f"{server.url}/health") == 200
        late = OpenRequest(server.url, stream=True, max_tokens=NUM_TOKENS)
        gate.touch()
        count = httpx.post(f"{server.url}/tokenize", json={"prompt": "abc"}, timeout=120)
        assert count.json()["count"] == 3
        expected = expected_text(model_dir, NUM_TOKENS)
        assert [text_of(request) for request in (*requests, late)] == [expected] * 6
        server.wait_until_ready()
        assert metric(server, f'restarts_total{{process="{kind}"}}') == 1
        # The late one counts unless the engine was back when it came.
        assert metric(server, "resumed_requests_total") in (5, 6)
        assert metric(server, "given_up_requests_total") == 0
        assert "it is started again" in server.output
        server.popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


@pytest.mark.timed
def test_a_killed_frontend_comes_back_without_its_requests(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--max-running-requests", "3")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = open_requests(server.url, num_streams=3, num_whole=0)
        server.child("frontend").kill()
        killed = time.monotonic()
        while works(server, "scheduler"):
            assert time.monotonic() < killed + 5
        # It arrives before there is a process to accept it, and needs one of the three places.
        late = OpenRequest(server.url, stream=False, max_tokens=20)
        assert all(request.join().error is not None for request in requests)
        assert not any("[DONE]" in request.text for request in requests)
        assert len(text_of(late)) > 0
        assert metric(server, "num_requests_running") == 0
        assert metric(server, 'restarts_total{process="frontend"}') == 1
        server.wait_until_ready().popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_too_many_deaths_end_the_server(model_dir: Path, socket_dir: Path) -> None:
    arguments = ("--model", str(model_dir), "--restart-limit", "2/60")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = open_requests(server.url, num_streams=2, num_whole=1)
        server.child("tokenizer").kill()
        wait_until(lambda: metric(server, "resumed_requests_total") == 3)
        server.child("detokenizer").kill()
        for request in requests:
            assert '"engine_dead"' in request.join().text
        assert server.wait() == 1
        assert "it is death number 2 within 60 s" in server.output
        server.assert_nothing_is_left()


def test_without_resuming_open_requests_fail_and_later_ones_are_served(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--no-resume")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        stream, whole = open_requests(server.url, num_streams=1, num_whole=1)
        server.child("detokenizer").kill()
        *_, error, done = stream.join().events
        assert json.loads(error)["error"]["code"] == "engine_restarted"
        assert done == "[DONE]"
        assert whole.join().status == 503
        assert json.loads(whole.text)["error"]["code"] == "engine_restarted"
        assert text_of(OpenRequest(server.url, stream=False, max_tokens=5))
        assert metric(server, 'given_up_requests_total{reason="no_resume"}') == 2


def test_a_drain_waits_for_requests_that_are_resumed(
    model_dir: Path, socket_dir: Path, gate: Path
) -> None:
    options: dict[str, Any] = {"tmp_dir": socket_dir, "step_s": STEP_S, "gate": gate}
    with running("--model", str(model_dir), **options) as server:
        requests = open_requests(server.url, num_streams=2, num_whole=1, max_tokens=NUM_TOKENS)
        gate.unlink()
        server.child("scheduler").kill()
        wait_until(lambda: status_of(f"{server.url}/ready") == 503)
        server.popen.terminate()
        wait_until(lambda: " draining open=3" in server.output)
        gate.touch()
        assert {text_of(one) for one in requests} == {expected_text(model_dir, NUM_TOKENS)}
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_a_stop_while_the_frontend_is_dead_ends_the_server(
    model_dir: Path, socket_dir: Path
) -> None:
    with running("--model", str(model_dir), tmp_dir=socket_dir) as server:
        server.child("frontend").kill()
        wait_until(lambda: "it is started again" in server.output)
        server.popen.terminate()
        assert server.wait() == 0
        assert "Traceback" not in server.output
        server.assert_nothing_is_left()


@pytest.mark.parametrize(
    "kind", ["engine.parallel", pytest.param("scheduler", marks=pytest.mark.soak)]
)
def test_all_ranks_start_again_after_the_death_of_one(kind: str, socket_dir: Path) -> None:
    with running(*REAL, tmp_dir=socket_dir, hash_engine=False) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body: dict[str, Any] = {"model": "demo", "prompt": "A story:", "max_tokens": 100}
        body |= {"temperature": 1.0, "seed": 3, "extra_body": {"ignore_eos": True}}
        expected = client.completions.create(**body).choices[0].text
        stream = client.completions.create(**body, stream=True)
        text = next(stream).choices[0].text
        server.child(kind).kill()
        text += "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert text == expected
        server.wait_until_ready().popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_an_embedded_frontend_resumes_too(
    model_dir: Path,
    new_children: Callable[[], list[psutil.Process]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from minisrv.supervision import supervisor

    monkeypatch.setitem(supervisor.MODULES, "scheduler", "tests.support.hash_scheduler")
    monkeypatch.setenv("MINISRV_TEST_STEP_S", str(STEP_S))

    async def run() -> None:
        async with FrontendManager(model=str(model_dir)) as manager:
            uid = manager.new_user()
            manager.send_one(message(uid, max_tokens=NUM_TOKENS))
            (process,) = [
                p for p in new_children() if p.cmdline()[-1] == "tests.support.hash_scheduler"
            ]
            text = ""
            async for ack in manager.wait_for_ack(uid):
                if not text:
                    process.send_signal(signal.SIGKILL)
                text += ack.incremental_output
            assert text == text_of_message(NUM_TOKENS)
            assert manager.registry.restarts == {"scheduler": 1}

    asyncio.run(asyncio.wait_for(run(), 60))
    assert not new_children()


def test_a_request_that_ends_the_engine_is_given_up_and_no_other(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir))
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S, poisons=True) as server:
        others = open_requests(server.url, num_streams=5, num_whole=0, max_tokens=NUM_TOKENS)
        reply = post_ids(server, [DEADLY_ID])
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "request_ended_engine"
        assert reply.headers["x-should-retry"] == "false"
        expected = expected_text(model_dir, NUM_TOKENS)
        assert [text_of(other) for other in others] == [expected] * 5
        assert metric(server, 'restarts_total{process="scheduler"}') == 2
        assert metric(server, "given_up_requests_total") == 1
        assert post_ids(server, [3]).status_code == 200


def post_ids(server: ServerProcess, prompt: list[int]) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 5}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


@pytest.mark.parametrize(
    "kind",
    [
        "scheduler",
        *(
            pytest.param(k, marks=pytest.mark.soak)
            for k in ("frontend", "detokenizer", "tokenizer")
        ),
    ],
)
def test_a_stopped_process_is_continued_and_nothing_is_lost(
    kind: str, model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--stall-timeout", "1")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = open_requests(server.url, num_streams=2, num_whole=1, max_tokens=NUM_TOKENS)
        server.child(kind).suspend()
        if kind != "frontend":
            wait_until(lambda: status_of(f"{server.url}/ready") == 503)
        assert {text_of(one) for one in requests} == {expected_text(model_dir, NUM_TOKENS)}
        wait_until(lambda: status_of(f"{server.url}/ready") == 200)
        wait_until(lambda: f"the {server_name(kind)} process goes on" in server.output)
        assert metric(server, "restarts_total") == 0
        assert "most recent call first" in server.output


def server_name(kind: str) -> str:
    return "tokenizer-0" if kind == "tokenizer" else kind


def test_a_process_that_hangs_is_killed_and_started_again(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--stall-timeout", "1")
    with running(*arguments, tmp_dir=socket_dir, poisons=True) as server:
        reply = post_ids(server, [ENDLESS_ID])
        assert reply.json()["error"]["code"] == "request_ended_engine"
        assert server.output.count("the scheduler process made no progress for") == 2
        assert "hash_scheduler.py" in server.output  # in the stacks
        assert post_ids(server, [3]).status_code == 200


def test_a_server_without_work_is_not_stalled(model_dir: Path, socket_dir: Path) -> None:
    arguments = ("--model", str(model_dir), "--stall-timeout", "2.5")
    with running(*arguments, tmp_dir=socket_dir) as server:
        time.sleep(5)
        assert "no progress" not in server.output
        assert metric(server, "restarts_total") == 0
