"""A queue that is full: 503 with a Retry-After that comes true."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import ServerProcess, running, wait_until

pytestmark = pytest.mark.timed

ROWS = 4
STEPS = 50
STEP_S = 0.01
BODY = {"prompt": "go on", "max_tokens": STEPS, "ignore_eos": True}


@contextmanager
def load(server: ServerProcess, num_clients: int) -> Iterator[list[httpx.Response]]:
    """Clients that send one request after another until the block ends; yields their replies."""
    replies: list[httpx.Response] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
            replies.append(answer)
            if answer.status_code != 200:
                time.sleep(0.2)

    threads = [threading.Thread(target=run) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield replies
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def waiting(server: ServerProcess) -> int:
    loads = httpx.get(f"{server.url}/v1/loads").json()["loads"][0]
    return int(loads.get("num_waiting_reqs", 0))  # none before the first report


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.soak), True])
def test_retry_after_is_within_a_factor_of_two_of_the_truth(
    stream: bool, model_dir: Path, socket_dir: Path
) -> None:
    limits = ("--max-running-requests", str(ROWS), "--max-waiting-requests", "20")
    with running("--model", str(model_dir), *limits, tmp_dir=socket_dir, step_s=STEP_S) as server:
        with load(server, ROWS + 20):
            time.sleep(2)  # a few rounds of running requests: now the rate is known
            wait_until(lambda: waiting(server) >= 18)
            url = f"{server.url}/v1/completions"
            for _ in range(100):
                refused = httpx.post(url, json={**BODY, "stream": stream}, timeout=60)
                if refused.status_code == 503:
                    break
            started = time.monotonic()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_overloaded"
        # The clients have stopped by now, and all that waited has been answered, in waves.
        truth = time.monotonic() - started - STEPS * STEP_S
        assert truth / 2 <= int(refused.headers["retry-after"]) <= truth * 2
        assert waiting(server) == 0
        assert httpx.post(url, json=BODY, timeout=60).status_code == 200
        assert 'reason="waiting_requests"' in httpx.get(f"{server.url}/metrics").text


def test_a_predicted_wait_over_the_limit_is_refused(model_dir: Path, socket_dir: Path) -> None:
    limits = ("--max-running-requests", str(ROWS), "--max-queue-wait", "1")
    with running("--model", str(model_dir), *limits, tmp_dir=socket_dir, step_s=STEP_S) as server:
        with load(server, 20) as replies:
            # No rate is known before the first replies, so the first requests of all clients are
            # accepted, and some second ones.
            wait_until(lambda: [reply.status_code for reply in replies].count(200) >= 30, 60)
            num_warm_up = len(replies)
            time.sleep(3)
        late = replies[num_warm_up:]
        refused = [answer for answer in late if answer.status_code == 503]
        served = [answer for answer in late if answer.status_code == 200]
        assert refused
        assert served
        assert all(1 <= int(answer.headers["retry-after"]) <= 8 for answer in refused)
        for answer in served:
            queue_ms = answer.headers["server-timing"].split("queue;dur=")[1].split(",")[0]
            assert float(queue_ms) < 2000
        assert 'reason="queue_wait"' in httpx.get(f"{server.url}/metrics").text
