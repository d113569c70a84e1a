"""All real processes with a small checkpoint: they answer, free what was aborted, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.server_process import (
    ServerProcess,
    environment,
    free_port,
    open_requests,
    running,
    status_of,
    wait_until,
)

NUM_PAGES = 140
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3")


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ("--model", str(checkpoint), "--num-pages", str(NUM_PAGES), "--num-threads", "1")
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield server
        server.popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_a_chat_is_answered_the_same_streamed_and_whole(
    server: ServerProcess, checkpoint: Path
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    request = {
        "model": str(checkpoint),
        "messages": [{"role": "user", "content": "tell me something about pages"}],
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.choices[0].message.content
    chunks = list(client.chat.completions.create(**request, stream=True))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    again = client.chat.completions.create(**request)  # type: ignore[call-overload]
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_forty_aborted_requests_leave_all_pages_free(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for i in range(40):
            body = {"prompt": f"number {i}", "max_tokens": 1900, "ignore_eos": True}
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
                next(reply.iter_lines())
        # This one needs nearly every page of the cache.
        ids = [i % 250 for i in range(1990)]
        assert len(ids) + 40 > (NUM_PAGES - 14) * PAGE_SIZE
        body = {"prompt": ids, "max_tokens": 40, "ignore_eos": True}
        reply = client.post("/v1/completions", json=body)
        assert reply.json()["usage"]["completion_tokens"] == 40


def test_http_is_the_only_thing_that_listens(server: ServerProcess) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in [psutil.Process(server.popen.pid), *server.family]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", int(server.url.rsplit(":", 1)[1]))}
    (run_dir,) = server.tmp_dir.iterdir()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    sockets = {path.name for path in run_dir.iterdir() if path.is_socket()}
    assert sockets == {"frontend", "tokenizer-0", "scheduler", "detokenizer"}
    files = {path.name for path in run_dir.iterdir() if not path.is_socket()}
    assert files == {f"progress-{name}" for name in sockets}


@pytest.mark.soak
def test_the_death_of_the_engine_fails_open_requests(checkpoint: Path, socket_dir: Path) -> None:
    arguments = ("--model", str(checkpoint), "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, hash_engine=False) as server:
        scheduler = server.child("scheduler")
        requests = open_requests(server.url, num_streams=1, num_whole=1, max_tokens=1900)
        scheduler.kill()
        stream, whole = (request.join() for request in requests)
        assert stream.events[-1] == "[DONE]"
        assert '"code":"engine_dead"' in stream.events[-2]
        assert whole.status == 500
        assert server.wait() == 1
        server.assert_nothing_is_left()


def test_the_app_runs_under_the_users_own_uvicorn(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp_dir = tmp_path_factory.mktemp("s")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "minisrv.asgi:app", "--port", str(port)],
        env=environment(
            MINISRV_MODEL_PATH=str(checkpoint), MINISRV_KV_MEMORY="64MiB", TMPDIR=str(tmp_dir)
        ),
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: status_of(f"{url}/health") == 200)
        assert status_of(f"{url}/ready") == 503
        wait_until(lambda: status_of(f"{url}/ready") == 200)
        children = psutil.Process(process.pid).children(recursive=True)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert reply.json()["object"] == "chat.completion"
        assert httpx.get(f"{url}/server_info").status_code == 403
        process.send_signal(signal.SIGINT)
        process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        assert not os.listdir(tmp_dir)
    finally:
        process.kill()
        process.wait()
