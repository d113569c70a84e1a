"""Start a server, and time how long it takes to stream the answers of a workload."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from workloads import Workload


@dataclass(frozen=True)
class Timing:
    """In seconds. ttft: mean over the streams. itl: median of the streams' mean token intervals."""

    wall: float
    ttft: float = 0.0
    itl: float = 0.0


@contextmanager
def served(
    model_dir: Path, threads: int, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The URL of a ready server, which is stopped at the end of the block."""
    command = [sys.executable, "-m", "minisrv.launch_server", "--model", str(model_dir)]
    command += ["--served-model-name", "bench", "--port", "0", "--num-threads", str(threads)]
    process = subprocess.Popen(
        [*command, "--log-level", "warning"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"http://\S+?(?=,)", first)
        assert found, first
        wait_ready(f"{found[0]}/ready", process)
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until the URL of the process answers 200, for ten minutes at most."""
    for _ in range(3000):
        assert process.poll() is None, f"the server ended with code {process.returncode}"
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=60).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError("the server did not become ready")


def measure(url: str, workload: Workload) -> Timing:
    """Send all requests at once and read their streams to the end."""
    return asyncio.run(_measure(url, workload))


async def _measure(url: str, workload: Workload) -> Timing:
    began = time.perf_counter()
    streams = await asyncio.gather(*(_stream(url, p, n) for p, n in workload))
    wall = time.perf_counter() - began
    gaps = [
        (last - first) / (count - 1)
        for (first, last), (_, count) in zip(streams, workload, strict=True)
        if count > 1
    ]
    ttft = statistics.mean(first for first, _ in streams)
    return Timing(wall, ttft, statistics.median(gaps) if gaps else 0.0)


async def _stream(url: str, prompt: list[int], count: int) -> tuple[float, float]:
    """Seconds from the start to the first and to the last chunk.

    Asserts that `count` tokens arrived. Uses plain asyncio streams, because on two cores a heavy
    client would distort the measurement.
    """
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps(
        {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    began = time.perf_counter()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first = last = 0.0
    received = [await reader.readuntil(b"\r\n\r\n")]
    assert received[0].startswith(b"HTTP/1.1 200"), received[0] + await reader.read()
    while data := await reader.read(2**16):
        last = time.perf_counter() - began
        first = first or last
        received.append(data)
    writer.close()
    text = b"".join(received).decode()
    assert '"error"' not in text, text[-1000:]
    assert re.search(rf'"completion_tokens":{count}\b', text), text[-1000:]
    return first, last
