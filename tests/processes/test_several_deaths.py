"""Deaths at the same time and shortly after one another: each request still has its own end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from minisrv.supervision.progress import _FIRST, _PLACE_ITEMS, _PLACES
from tests.processes.test_restarts import metric, text_of
from tests.support.server_process import (
    OpenRequest,
    ServerProcess,
    expected_text,
    num_open,
    open_requests,
    running,
    status_of,
    wait_until,
)

STEP_S = 0.01
NUM_TOKENS = 200


@pytest.fixture
def server(model_dir: Path, socket_dir: Path, gate: Path) -> Iterator[ServerProcess]:
    """Within one second, so that no death counts for those that come later."""
    arguments = ("--model", str(model_dir), "--restart-limit", "9/1")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S, gate=gate) as server:
        yield server
        wait_until(lambda: status_of(f"{server.url}/ready") == 200)
        assert num_open(server.url) == 0
        server.wait_until_ready().popen.terminate()
        assert server.wait() == 0
        assert "Traceback" not in server.output
        server.assert_nothing_is_left()


@contextlib.contextmanager
def without_engine(server: ServerProcess, gate: Path) -> Iterator[None]:
    """The scheduler dies, and is not back before the end."""
    gate.unlink()
    server.child("scheduler").kill()
    wait_until(lambda: status_of(f"{server.url}/ready") == 503)
    try:
        yield
    finally:
        gate.touch()


def kill_again(server: ServerProcess, kind: str) -> None:
    """Kill a process, and the one that takes its place as soon as it is there."""
    first = server.child(kind)
    first.kill()

    def replaced() -> bool:
        try:
            return server.child(kind).pid != first.pid
        except ValueError:  # there is none yet
            return False

    wait_until(replaced)
    server.child(kind).kill()


def kill_in_step(server: ServerProcess, num_requests: int) -> None:
    """Kill the scheduler in a step that computes as many requests."""
    scheduler = server.child("scheduler")
    (path,) = server.tmp_dir.glob("*/progress-scheduler")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        scheduler.suspend()
        wait_until(lambda: scheduler.status() == psutil.STATUS_STOPPED)
        items = np.fromfile(path, np.int64)
        if max(items[_FIRST + place * _PLACE_ITEMS] for place in range(_PLACES)) == num_requests:
            scheduler.kill()
            return
        scheduler.resume()
        time.sleep(STEP_S / 2)
    pytest.fail("no step computes all requests")


def test_requests_survive_the_death_of_all_processes_but_the_frontend(
    server: ServerProcess, model_dir: Path
) -> None:
    requests = open_requests(server.url, num_streams=3, num_whole=1, max_tokens=NUM_TOKENS)
    for kind in ("scheduler", "detokenizer", "tokenizer"):
        server.child(kind).kill()
    texts = {text_of(request) for request in requests}
    assert texts == {expected_text(model_dir, NUM_TOKENS)}
    assert metric(server, "restarts_total") == 3


@pytest.mark.soak
def test_requests_survive_a_process_that_dies_while_it_starts(
    server: ServerProcess, model_dir: Path
) -> None:
    requests = open_requests(server.url, num_streams=3, num_whole=1, max_tokens=NUM_TOKENS)
    kill_again(server, "scheduler")
    texts = {text_of(request) for request in requests}
    assert texts == {expected_text(model_dir, NUM_TOKENS)}
    assert metric(server, 'restarts_total{process="scheduler"}') == 2
    assert metric(server, "given_up_requests_total") == 0


@pytest.mark.soak
def test_a_frontend_that_dies_without_an_engine_comes_back_with_it(
    server: ServerProcess, gate: Path
) -> None:
    requests = open_requests(server.url, num_streams=2, num_whole=1)
    with without_engine(server, gate):
        server.child("frontend").kill()
        for request in requests:
            assert request.join().error is not None
            assert "[DONE]" not in request.text
    assert text_of(OpenRequest(server.url, stream=True, max_tokens=20))
    assert metric(server, "num_requests_running") == 0


@pytest.mark.parametrize("leaves_first", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_client_that_leaves_while_there_is_no_engine_is_forgotten(
    server: ServerProcess, gate: Path, leaves_first: bool
) -> None:
    """leaves_first: the scheduler dies before it has ended the request."""
    body = {"prompt": "go on", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with contextlib.ExitStack() as connection:
        url = f"{server.url}/v1/completions"
        lines = connection.enter_context(httpx.stream("POST", url, json=body)).iter_lines()
        next(lines)
        if leaves_first:
            server.child("scheduler").suspend()
            connection.close()
        with without_engine(server, gate):
            assert leaves_first or num_open(server.url) == 1
            connection.close()
            wait_until(lambda: num_open(server.url) == 0)
    wait_until(lambda: status_of(f"{server.url}/ready") == 200)
    assert metric(server, "resumed_requests_total") == 0
    assert num_open(server.url) == 0


def test_requests_can_be_aborted_while_there_is_no_engine(
    server: ServerProcess, gate: Path
) -> None:
    requests = open_requests(server.url, num_streams=2, num_whole=1)
    with without_engine(server, gate):
        late = OpenRequest(server.url, stream=True, max_tokens=20)
        wait_until(lambda: num_open(server.url) == 4)
        reply = httpx.post(f"{server.url}/abort_request", json={"abort_all": True})
        assert reply.status_code == 200
        for request in (*requests, late):
            assert request.join().error is None
            assert '"request_aborted"' in request.text
    wait_until(lambda: status_of(f"{server.url}/ready") == 200)
    assert metric(server, "resumed_requests_total") == 0


def test_those_in_two_dying_steps_are_given_up_and_all_others_go_on(
    server: ServerProcess, model_dir: Path
) -> None:
    suspects = open_requests(server.url, num_streams=3, num_whole=0)
    kill_in_step(server, 3)
    wait_until(lambda: metric(server, "resumed_requests_total") == 3)
    lengths = [len(request.text) for request in suspects]
    wait_until(lambda: all(len(r.text) > n for r, n in zip(suspects, lengths, strict=True)))
    late = OpenRequest(server.url, stream=True, max_tokens=NUM_TOKENS)
    server.child("tokenizer").kill()
    wait_until(lambda: metric(server, 'restarts_total{process="tokenizer"}') == 1)
    late.wait_for_text()
    kill_in_step(server, 4)
    for request in suspects:
        *_, error, done = request.join().events
        assert json.loads(error)["error"]["code"] == "request_ended_engine"
        assert done == "[DONE]"
    assert text_of(late) == expected_text(model_dir, NUM_TOKENS)
    assert metric(server, 'given_up_requests_total{reason="suspect"}') == 3


@pytest.mark.soak
def test_two_deaths_with_256_tokens_in_between_give_nobody_up(
    server: ServerProcess, model_dir: Path
) -> None:
    requests = open_requests(server.url, num_streams=3, num_whole=0, max_tokens=600)
    kill_in_step(server, 3)
    wait_until(lambda: metric(server, "resumed_requests_total") == 3)
    lengths = [len(request.events) for request in requests]
    until = time.monotonic() + 60
    while any(len(r.events) < n + 260 for r, n in zip(requests, lengths, strict=True)):
        assert time.monotonic() < until
        time.sleep(0.1)
    kill_in_step(server, 3)
    texts = {text_of(request) for request in requests}
    assert texts == {expected_text(model_dir, 600)}
    assert metric(server, "given_up_requests_total") == 0


@pytest.mark.soak
def test_a_process_that_hangs_while_it_is_started_again_is_killed(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--stall-timeout", "1", "--restart-limit", "9/1")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = open_requests(server.url, num_streams=2, num_whole=1, max_tokens=NUM_TOKENS)
        first = server.child("scheduler")
        first.kill()
        wait_until(lambda: "scheduler" in modules(server, but=first.pid))
        server.child("scheduler").suspend()
        assert {text_of(one) for one in requests} == {expected_text(model_dir, NUM_TOKENS)}
        assert "the scheduler process did not start within" in server.output
        assert metric(server, 'restarts_total{process="scheduler"}') == 2


def modules(server: ServerProcess, but: int) -> str:
    """The modules of the processes that run, without one of them."""
    names = []
    for process in psutil.Process(server.popen.pid).children():
        with contextlib.suppress(psutil.Error, IndexError):
            if process.pid != but:
                names.append(process.cmdline()[-1])
    return " ".join(names)
