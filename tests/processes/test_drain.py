"""A stop that was requested: what was accepted ends as ever, and nothing else begins."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.server_process import (
    OpenRequest,
    ServerProcess,
    environment,
    free_port,
    num_open,
    open_requests,
    running,
    status_of,
    suspended,
    wait_until,
)

STEP_S = 0.01
NUM_TOKENS = 150


def assert_complete(requests: list[OpenRequest], num_tokens: int = NUM_TOKENS) -> None:
    for request in requests:
        request.join()
        assert (request.error, request.status) == (None, 200), request.text
        if request.events:
            *_, last, done = request.events
            assert done == "[DONE]"
            assert json.loads(last)["choices"][0]["finish_reason"] == "length", last
        else:
            assert json.loads(request.text)["usage"]["completion_tokens"] == num_tokens


def assert_ended(requests: list[OpenRequest]) -> None:
    for request in requests:
        text = request.join().text
        error = request.events[-2] if request.events else text
        assert json.loads(error)["error"]["code"] == "server_draining", text


def assert_drains(url: str, http: httpx.Client) -> None:
    """It is alive and not ready, and refuses on old and new connections."""
    wait_until(lambda: status_of(f"{url}/ready") == 503)
    ready = httpx.get(f"{url}/ready")
    assert ready.json()["status"] == "draining"
    assert ready.headers["retry-after"]
    assert httpx.get(f"{url}/health").status_code == 200
    for client in (http, httpx):
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            refused = client.post(f"{url}{path}", json=body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.headers["connection"] == "close"
            assert refused.json()["error"]["code"] == "server_draining"


def wait_until_draining(server: ServerProcess) -> None:
    wait_until(lambda: " draining open=" in server.output)


def start_requests(url: str, num_tokens: int = NUM_TOKENS) -> list[OpenRequest]:
    """More than the hash engine's pages hold, so that some wait."""
    return list(open_requests(url, num_streams=20, num_whole=20, max_tokens=num_tokens))


@pytest.fixture
def server(model_dir: Path, socket_dir: Path) -> Iterator[ServerProcess]:
    with running("--model", str(model_dir), tmp_dir=socket_dir, step_s=STEP_S) as server:
        yield server
        server.assert_nothing_is_left()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_lets_open_requests_end_and_refuses_others(
    number: signal.Signals, server: ServerProcess
) -> None:
    scheduler = server.child("scheduler")
    with httpx.Client(timeout=60) as http:
        assert http.get(f"{server.url}/health").status_code == 200
        requests = start_requests(server.url)
        with suspended(scheduler):  # so that some are open for as long as the checks take
            # As a terminal does it: to every process of the group.
            os.killpg(server.popen.pid, number)
            assert_drains(server.url, http)
    assert_complete(requests)
    assert server.wait() == 0
    assert "Traceback" not in server.output
    assert f" stopping signal={number.name}\n" in server.output
    assert re.search(r" draining open=\d+ timeout_s=30\.0\n", server.output)
    assert re.search(r" drained open=0 ms=\d+\n", server.output)


def test_a_signal_to_every_process_lets_open_requests_end(server: ServerProcess) -> None:
    """As service managers do it."""
    requests = start_requests(server.url)
    for process in [*server.family, server.popen]:
        process.terminate()
    assert_complete(requests)
    assert server.wait() == 0


def test_a_drain_by_http_is_as_one_by_a_signal_and_may_be_followed_by_one(
    server: ServerProcess,
) -> None:
    scheduler = server.child("scheduler")
    requests = start_requests(server.url)
    with suspended(scheduler):
        for _ in range(2):
            response = httpx.post(f"{server.url}/drain")
            assert (response.status_code, response.json()) == (202, {"status": "draining"})
        server.popen.terminate()
        with httpx.Client(timeout=60) as http:
            assert_drains(server.url, http)
    assert_complete(requests)
    assert server.wait() == 0


def test_a_drain_by_http_ends_the_server_by_itself(server: ServerProcess) -> None:
    assert httpx.post(f"{server.url}/drain").status_code == 202
    assert server.wait() == 0


def test_what_outlasts_the_drain_timeout_is_reported(model_dir: Path, socket_dir: Path) -> None:
    arguments = ("--model", str(model_dir), "--drain-timeout", "0.5")
    with running(*arguments, tmp_dir=socket_dir, step_s=0.05) as server:
        requests = start_requests(server.url, num_tokens=1500)
        started = time.monotonic()
        server.popen.terminate()
        assert_ended(requests)
        assert time.monotonic() - started >= 0.5
        assert server.wait() == 0
        server.assert_nothing_is_left()


@pytest.mark.timed
def test_a_second_signal_ends_open_requests_in_time(server: ServerProcess) -> None:
    requests = start_requests(server.url, num_tokens=1500)
    server.popen.terminate()
    wait_until_draining(server)
    assert server.popen.poll() is None
    started = time.monotonic()
    server.popen.terminate()
    assert server.wait() == 0
    assert time.monotonic() - started < 3
    assert_ended(requests)


def test_without_restarts_a_death_during_a_drain_fails_what_is_open(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, step_s=STEP_S) as server:
        requests = start_requests(server.url, num_tokens=1500)
        server.popen.terminate()
        wait_until_draining(server)
        server.child("scheduler").kill()
        for request in requests:
            error = request.events[-2] if request.join().events else request.text
            assert json.loads(error)["error"]["code"] == "engine_dead"
        assert server.wait() == 1


def raw_connection(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_body_that_comes_late_is_refused_without_a_reset(server: ServerProcess) -> None:
    with raw_connection(server) as late, raw_connection(server) as never:
        for connection in (late, never):
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 15\r\n"
                b"Expect: 100-continue\r\n\r\n{"
            )
            assert connection.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        server.popen.terminate()
        wait_until(lambda: " drained open=0" in server.output)
        late.sendall(b'"prompt": "x"}')
        for connection in (late, never):
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 503"), answer
            assert b"server_draining" in answer
    assert server.wait() == 0


def test_a_stream_whose_reader_is_slow_arrives_whole(model_dir: Path, socket_dir: Path) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        "Content-Type: application/json\r\n"
    )
    # All steps take three seconds of the drain's 30, and nothing is read for most of them.
    with running("--model", str(model_dir), tmp_dir=socket_dir, step_s=0.002) as server:
        with raw_connection(server) as reader:
            reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            answer = reader.recv(1024)
            server.popen.terminate()
            time.sleep(2)
            answer += read_all(reader)
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert answer.count(b"data: ") > 1000
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_a_query_that_waits_is_answered(server: ServerProcess) -> None:
    answers: list[httpx.Response] = []
    ask = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{server.url}/tokenize", json={"prompt": "abc"}, timeout=60)
        )
    )
    with suspended(server.child("tokenizer")):
        ask.start()
        wait_until(lambda: num_open(server.url) == 1)
        server.popen.terminate()
        wait_until_draining(server)
        time.sleep(1)  # a drain with nothing to wait for ends after 0.2 s
        assert " drained open=" not in server.output
    ask.join()
    assert answers[0].json()["count"] == 3
    assert server.wait() == 0


@pytest.mark.parametrize("how", ["signal", "http"])
def test_a_stop_during_the_start_does_not_wait(
    how: str, model_dir: Path, socket_dir: Path, tmp_path: Path
) -> None:
    server = ServerProcess("--model", str(model_dir), tmp_dir=socket_dir, gate=tmp_path / "never")
    try:
        wait_until(lambda: status_of(f"{server.url}/ready") == 503)
        if how == "signal":
            server.popen.terminate()
        else:
            assert httpx.post(f"{server.url}/drain").status_code == 202
        assert server.wait() == 0
        server.assert_nothing_is_left()
    finally:
        server.end()


@pytest.mark.parametrize("how", ["signal", pytest.param("http", marks=pytest.mark.soak)])
def test_an_application_under_another_server_drains(
    how: str, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port = free_port()
    tmp_dir = tmp_path_factory.mktemp("s")
    variables = environment(
        MINISRV_MODEL=str(model_dir),
        MINISRV_ADMIN_KEY="admin",
        MINISRV_TEST_STEP_S=str(STEP_S),
        TMPDIR=str(tmp_dir),
    )
    uvicorn = [sys.executable, "-m", "uvicorn", "tests.support.hash_asgi:app"]
    process = subprocess.Popen([*uvicorn, "--port", str(port)], env=variables)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status_of(f"{url}/ready") == 200 or process.poll() is not None)
        requests = start_requests(url)
        family = psutil.Process(process.pid).children(recursive=True)
        if how == "http":
            key = {"Authorization": "Bearer admin"}
            assert httpx.post(f"{url}/drain", headers=key).status_code == 202
            assert httpx.post(f"{url}/tokenize", json={"prompt": "x"}).status_code == 503
            assert_complete(requests)
            wait_until(lambda: status_of(f"{url}/health") == 503)
            assert not psutil.wait_procs(family, timeout=30)[1]
        process.terminate()
        assert_complete(requests)
        process.wait(60)
        assert not psutil.wait_procs(family, timeout=30)[1]
        assert not list(tmp_dir.iterdir())
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("num_drains", [1, pytest.param(50, marks=pytest.mark.soak)])
def test_drains_under_load_complete_whatever_was_accepted(
    num_drains: int, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Clients that never pause: each request ends, is refused, or finds nobody listening."""
    completed = refused = 0
    for number in range(num_drains):
        tmp_dir = tmp_path_factory.mktemp("s") / "t"
        with running("--model", str(model_dir), tmp_dir=tmp_dir, step_s=0.002) as server:
            clients = [BusyClient(server.url, seed) for seed in range(16 * (1 + number % 4))]
            wait_for_replies(clients, 16)
            time.sleep(0.037 * (number % 11))
            server.popen.terminate()
            assert server.wait(120) == 0
            for client in clients:
                client.join()
                assert not client.broken, client.broken
            completed += sum(client.completed for client in clients)
            refused += sum(client.refused for client in clients)
            server.assert_nothing_is_left()
    print(f"{num_drains} drains: {completed} completed, {refused} refused")
    assert refused


def wait_for_replies(clients: list[BusyClient], count: int) -> None:
    wait_until(lambda: sum(client.completed + len(client.broken) for client in clients) >= count)


class BusyClient:
    """Sends one request after the other, over one connection while it lasts, to the server's end.

    broken: requests that were accepted and have no proper end.
    """

    def __init__(self, url: str, seed: int) -> None:
        self.completed = self.refused = 0
        self.broken: list[str] = []
        self._url, self._seed = url, seed
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "a request hangs"

    def _run(self) -> None:
        with httpx.Client(timeout=120) as http:
            while True:
                self._replying = False
                try:
                    self._send(http)
                except httpx.TransportError as error:
                    if self._replying or status_of(f"{self._url}/health") is not None:
                        self.broken.append(repr(error))
                    return

    def _send(self, http: httpx.Client) -> None:
        self._seed += 1
        stream = self._seed % 3 > 0
        body = {"prompt": "go on", "ignore_eos": True, "stream": stream}
        body["max_tokens"] = 20 + 37 * self._seed % 150
        with http.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            self._replying = True
            text = "".join(response.iter_text())
        if response.status_code == 503:
            assert "server_draining" in text
            self.refused += 1
            time.sleep(0.02)
        elif '"finish_reason":"length"' in text and (not stream or text.endswith("[DONE]\n\n")):
            self.completed += 1
        else:
            self.broken.append(text[-200:])
