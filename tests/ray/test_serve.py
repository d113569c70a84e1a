"""Replicas on Ray Serve: streams, the cost router, fewer replicas, the death of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.server_process import (
    PYTHONPATH,
    OpenRequest,
    free_port,
    wait_until,
    write_model_dir,
)

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.soak
STEP_S = 0.02


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    from tests.support import hash_ray

    os.environ["MINISRV_TEST_STEP_S"] = str(STEP_S)
    environment = {"PYTHONPATH": PYTHONPATH, "MINISRV_TEST_STEP_S": str(STEP_S)}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment})
    port = free_port()
    serve.start(http_options={"port": port})
    serve.run(hash_ray.build({"model": str(model_dir), "num_replicas": 2, "num_cpus": 0.5}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    del os.environ["MINISRV_TEST_STEP_S"]


def complete(url: str, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def replicas() -> list[psutil.Process]:
    names = ((one, " ".join(one.cmdline()[:1])) for one in psutil.process_iter())
    return [one for one, name in names if name.startswith("ray::ServeReplica:default:minisrv")]


def test_a_stream_has_the_text_of_a_whole_reply_in_many_pieces(url: str) -> None:
    assert httpx.get(f"{url}/ready", timeout=30).json() == {"status": "ready"}
    whole = complete(url, "go on", max_tokens=30).json()["choices"][0]["text"]
    body = {"prompt": "go on", "max_tokens": 30, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        pieces = list(response.iter_text())
    assert len(pieces) > 10, "the ingress buffers"
    events = [line[6:] for line in "".join(pieces).splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]) == whole


def test_errors_and_bodies_that_are_too_large_have_their_form(url: str) -> None:
    refused = complete(url, "a", temperature=9)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    large = httpx.post(f"{url}/v1/completions", content=b"x" * (9 * 2**20), timeout=60)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


def test_a_prompt_returns_to_the_replica_that_has_it_cached(url: str) -> None:
    prompts = [f"{i} " + "and so on, " * 90 for i in range(10)]
    for prompt in prompts:
        assert complete(url, prompt).status_code == 200
    assert len(replicas()) == 2
    for prompt in prompts[-3:]:
        usage = complete(url, prompt).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 900


def test_a_replica_that_is_removed_ends_its_requests_first(url: str, model_dir: Path) -> None:
    from tests.support import hash_ray

    requests = [OpenRequest(url, stream=bool(i % 2), max_tokens=150) for i in range(6)]
    for request in requests[1::2]:
        request.wait_for_text()
    serve.run(hash_ray.build({"model": str(model_dir), "num_replicas": 1, "num_cpus": 0.5}))
    for request in requests:
        request.join()
        assert (request.error, request.status) == (None, 200)
        assert '"error"' not in request.text
    wait_until(lambda: len(replicas()) == 1)


def test_a_replica_that_is_killed_costs_only_the_streams_that_it_was_sending(url: str) -> None:
    whole = OpenRequest(url, stream=False, max_tokens=100)
    stream = OpenRequest(url, stream=True, max_tokens=1500)
    stream.wait_for_text()
    for one in replicas():
        one.kill()
    assert stream.join().events[-1] == "[DONE]"
    assert '"engine_dead"' in stream.text
    assert (whole.join().error, whole.status) == (None, 200)  # sent again
