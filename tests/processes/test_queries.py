"""Queries and aborts at a tokenizer that is busy, and a reply that makes no sense."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from minisrv.supervision.records import FIRST_EPOCH
from minisrv.wire.sockets import INBOX_BYTES, Epoch, Outbox
from tests.support.scripted_backend import reply
from tests.support.server_process import num_open, open_requests, running, suspended, wait_until
from tests.support.stream_watch import request_bytes

MIB = 2**20


def load_of(url: str) -> dict[str, int]:
    """Without the scheduler's figures before its first report."""
    load: dict[str, int] = httpx.get(f"{url}/v1/loads").json()["loads"][0]
    return load


@contextmanager
def ask_and_leave(url: str) -> Iterator[None]:
    """A query whose client waits until the end, and is gone then."""
    body = b'{"prompt": "hi"}'
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(request_bytes("/tokenize", body))
        yield
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):  # it was not answered
            connection.recv(1)


def test_queries_count_as_open_requests_and_those_without_a_client_are_dropped(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--max-open-requests", "4")
    with running(*arguments, tmp_dir=socket_dir) as server:
        with suspended(server.child("tokenizer")), ExitStack() as asked:
            for _ in range(4):
                asked.enter_context(ask_and_leave(server.url))
            wait_until(lambda: num_open(server.url) == 4)
            for path, body in (("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [1]})):
                refused = httpx.post(server.url + path, json=body)
                assert refused.status_code == 503
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["code"] == "server_overloaded"
            assert httpx.get(f"{server.url}/tokenizer_info").status_code == 503
            asked.close()
        wait_until(lambda: num_open(server.url) == 0)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'refused_requests_total{reason="open_requests"} 3.0' in metrics
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "hi"}).json()["count"] == 2


@pytest.mark.timed
def test_a_tokenizer_that_does_not_keep_up_is_a_503_and_never_a_blocked_frontend(
    model_dir: Path, socket_dir: Path
) -> None:
    text = "x" * (8 * MIB - 1024)
    num_fit = INBOX_BYTES // len(text)
    statuses: list[int] = []

    def ask() -> None:
        answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=60)
        assert answer.status_code != 503 or answer.headers["retry-after"] == "1"
        statuses.append(answer.status_code)

    with running("--model", str(model_dir), tmp_dir=socket_dir) as server:
        with suspended(server.child("tokenizer")):
            threads = [threading.Thread(target=ask) for _ in range(num_fit + 3)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(statuses) == 3)
            assert statuses == [503] * 3
            started = time.monotonic()
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert time.monotonic() - started < 0.5
        for thread in threads:
            thread.join()
        # They do not fit the context, but they were read.
        assert statuses[3:] == [400] * num_fit
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "hi"}).status_code == 200


def test_an_abort_does_not_wait_for_the_tokenizer(model_dir: Path, socket_dir: Path) -> None:
    with running("--model", str(model_dir), tmp_dir=socket_dir, step_s=0.02) as server:
        body = {"prompt": "go on", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=30) as response:
            chunks = response.iter_text()
            next(chunks)
            wait_until(lambda: load_of(server.url).get("num_running_reqs") == 1)
            server.child("tokenizer").suspend()
        try:
            del chunks
            wait_until(lambda: load_of(server.url).get("num_running_reqs") == 0)
            wait_until(lambda: load_of(server.url)["num_open_reqs"] == 0)
        finally:
            server.child("tokenizer").resume()


def test_without_restarts_a_reply_that_makes_no_sense_ends_the_server(
    model_dir: Path, socket_dir: Path
) -> None:
    arguments = ("--model", str(model_dir), "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, step_s=0.02) as server:
        (stream,) = open_requests(server.url, num_streams=1, num_whole=0)
        (path,) = socket_dir.rglob("frontend")
        outbox = Outbox(path.parent, "frontend", Epoch(FIRST_EPOCH))
        outbox.send(reply(1, "a", 1, finish=99))  # type: ignore[arg-type]
        *_, error, done = stream.join().events
        assert (json.loads(error)["error"]["code"], done) == ("engine_dead", "[DONE]")
        assert server.wait() == 1
        assert "the frontend" in server.output
        assert "99" in server.output
        server.assert_nothing_is_left()
        outbox.close()


def test_the_line_of_a_client_that_left_has_the_length_of_its_prompt(
    model_dir: Path, socket_dir: Path
) -> None:
    with running("--model", str(model_dir), tmp_dir=socket_dir, step_s=0.3) as server:
        body = json.dumps({"prompt": "x" * 1500, "request_id": "left"}).encode()
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(request_bytes("/v1/completions", body))
            wait_until(lambda: load_of(server.url).get("num_running_reqs") == 1)
        wait_until(lambda: "id=left ended=abort" in server.output)
        (line,) = [line for line in server.lines if "id=left ended=abort" in line]
        assert "status=499" in line
        assert "prompt=1500 cached=0 output=0" in line
