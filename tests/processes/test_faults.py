"""Deaths and signals, with requests open: nobody hangs, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.support.server_process import (
    PYTHONPATH,
    WITH_HASH_ENGINE,
    OpenRequest,
    ServerProcess,
    environment,
    open_requests,
    running,
    wait_until,
)

STEP_S = 0.02


def assert_failed(requests: list[OpenRequest], status: int, code: str) -> None:
    for request in requests:
        request.join()
        if request.events:
            assert request.status == 200
            *_, error, done = request.events
            assert done == "[DONE]"
        else:
            assert request.status == status
            error = request.text
        assert json.loads(error)["error"]["code"] == code


@pytest.mark.parametrize(
    "kind",
    ["scheduler", *(pytest.param(k, marks=pytest.mark.soak) for k in ("detokenizer", "tokenizer"))],
)
def test_without_restarts_a_death_behind_the_frontend_fails_open_requests_and_ends_all(
    kind: str, model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = open_requests(server.url, num_streams=3, num_whole=3)
        server.child(kind).kill()
        assert_failed(list(requests), 500, "engine_dead")
        assert server.wait() == 1
        assert f"the {kind}" in server.output
        assert "SIGKILL" in server.output
        server.assert_nothing_is_left()


def test_the_openai_client_raises_when_the_engine_dies_in_a_stream(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model=str(model_dir), prompt="go on", max_tokens=1500, stream=True
        )
        next(stream)
        server.child("scheduler").kill()
        with pytest.raises(openai.APIError, match="the scheduler process has died"):
            for _ in stream:
                pass


def test_without_restarts_the_death_of_the_frontend_ends_all(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        (stream,) = open_requests(server.url, num_streams=1, num_whole=0)
        server.child("frontend").kill()
        assert stream.join().error is not None
        assert server.wait() == 1
        assert "the frontend process has died" in server.output
        server.assert_nothing_is_left()


@pytest.mark.timed
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_without_time_to_drain_a_signal_fails_open_requests_and_ends_all(
    number: signal.Signals, model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--drain-timeout", "0")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = open_requests(server.url, num_streams=3, num_whole=3)
        started = time.monotonic()
        # As a terminal does it: to every process of the group.
        os.killpg(server.popen.pid, number)
        assert_failed(list(requests), 503, "server_draining")
        assert server.wait() == 0
        assert time.monotonic() - started < 5
        server.assert_nothing_is_left()


def test_a_client_in_the_middle_of_its_request_does_not_hold_up_the_end(
    model_dir: Path, socket_dir: Path
) -> None:
    with running("--model", str(model_dir), tmp_dir=socket_dir) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
            )
            time.sleep(0.2)
            server.popen.terminate()
            assert server.wait() == 0
        server.assert_nothing_is_left()


@pytest.mark.timed
def test_a_second_signal_ends_all_at_once(model_dir: Path, socket_dir: Path) -> None:
    with running("--model", str(model_dir), tmp_dir=socket_dir) as server:
        server.child("frontend").suspend()  # it cannot say its last words
        server.popen.terminate()
        wait_until(lambda: " stopping signal=SIGTERM" in server.output)
        assert server.popen.poll() is None
        started = time.monotonic()
        server.popen.terminate()
        assert server.wait() == 0
        assert time.monotonic() - started < 2.5  # and not END_GRACE_S
        server.assert_nothing_is_left()


def test_a_stuck_process_is_killed_in_time(model_dir: Path, socket_dir: Path) -> None:
    arguments = ("--model", str(model_dir), "--drain-timeout", "0")
    with running(*arguments, tmp_dir=socket_dir) as server:
        for process in server.family:
            process.suspend()
        server.popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_a_killed_supervisor_leaves_no_process_behind(model_dir: Path, socket_dir: Path) -> None:
    with running("--model", str(model_dir), tmp_dir=socket_dir, step_s=STEP_S) as server:
        (stream,) = open_requests(server.url, num_streams=1, num_whole=0)
        port = int(server.url.rsplit(":", 1)[1])
        server.popen.kill()
        _, alive = psutil.wait_procs(server.family, timeout=30)
        assert not alive
        assert stream.join().error is not None
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.soak
def test_children_that_are_stopped_when_the_supervisor_is_killed_die_too(
    model_dir: Path, socket_dir: Path
) -> None:
    """They cannot read the end of their lifeline: the kernel kills them."""
    with running("--model", str(model_dir), tmp_dir=socket_dir) as server:
        for process in server.family:
            process.suspend()
        server.popen.kill()
        _, alive = psutil.wait_procs(server.family, timeout=30)
        assert not alive


def test_a_signal_during_the_start_ends_all(model_dir: Path, socket_dir: Path) -> None:
    server = ServerProcess("--model", str(model_dir), tmp_dir=socket_dir)
    try:
        assert server.url
        server.popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()
    finally:
        server.end()


@pytest.mark.soak
def test_two_servers_run_side_by_side(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first_dir, second_dir = (tmp_path_factory.mktemp("s") / "t" for _ in range(2))
    with (
        running("--model", str(model_dir), tmp_dir=first_dir) as first,
        running("--model", str(model_dir), tmp_dir=second_dir) as second,
    ):
        body = {"prompt": "the same", "max_tokens": 20}
        texts = {
            httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
            for server in (first, second)
        }
        assert len(texts) == 1
        assert texts != {""}


def test_a_notice_that_the_frontend_cannot_handle_ends_the_server_loudly(
    model_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_dir = tmp_path_factory.mktemp("s")
    (tmp_path / "scheduler_without_facts.py").write_text(
        "import time\n"
        "from minisrv.supervision.child_main import run_child\n"
        "from minisrv.supervision.records import ChildReady\n"
        "def main(child):\n"
        "    child.report(ChildReady({}))\n"
        "    time.sleep(60)\n"
        "run_child('scheduler', main)\n"
    )
    program = WITH_HASH_ENGINE.replace("tests.support.hash_scheduler", "scheduler_without_facts")
    options = ("--port", "0", "--restart-limit", "0", "--model", str(model_dir))
    done = subprocess.run(
        [sys.executable, "-c", program, *options],
        env=environment(PYTHONPATH=f"{PYTHONPATH}{os.pathsep}{tmp_path}", TMPDIR=str(tmp_dir)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert "frontend" in done.stderr
    assert "the frontend process has died: KeyError" in done.stderr
    assert not list(tmp_dir.iterdir())
