"""A server under test, and the time it takes to stream a workload's answers."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from workloads import Workload


@dataclass(frozen=True)
class Timing:
    """Seconds. ttft: mean time to the first token. itl: median time between tokens."""

    wall: float
    ttft: float = 0.0
    itl: float = 0.0


@contextmanager
def served(model_dir: Path, threads: int) -> Iterator[str]:
    """The URL of a server that is ready; it ends with the block."""
    command = [sys.executable, "-m", "minisrv.launch_server", "--model", str(model_dir)]
    command += ["--served-model-name", "bench", "--port", "0", "--num-threads", str(threads)]
    process = subprocess.Popen(
        [*command, "--log-level", "warning"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"http://\S+?(?=,)", first)
        assert found, first
        _wait_ready(found[0])
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


def _wait_ready(url: str) -> None:
    for _ in range(600):
        if httpx.get(f"{url}/ready", timeout=60).status_code == 200:
            return
        time.sleep(0.2)
    raise TimeoutError("the server does not become ready")


def measure(url: str, workload: Workload) -> Timing:
    """Send all requests at once and read their streams to the end."""
    return asyncio.run(_measure(url, workload))


async def _measure(url: str, workload: Workload) -> Timing:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        streams = await asyncio.gather(*(_stream(client, p, n) for p, n in workload))
        wall = time.perf_counter() - began
    gaps = [
        (times[-1] - times[0]) / (count - 1)
        for times, (_, count) in zip(streams, workload, strict=True)
        if count > 1
    ]
    ttft = statistics.mean(times[0] for times in streams)
    return Timing(wall, ttft, statistics.median(gaps))


async def _stream(client: httpx.AsyncClient, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start to each chunk with text; checks that `count` tokens came."""
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, usage = [], None
    began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            if chunk["choices"]:
                times.append(time.perf_counter() - began)
            usage = chunk.get("usage") or usage
    assert usage is not None
    assert usage["completion_tokens"] == count, usage
    return times
