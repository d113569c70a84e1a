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

import httpx

from minisrv.bench.client import Client
from minisrv.bench.measures import latencies
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
    """Send all requests at once, as `minisrv bench` does. Asserts that all tokens arrived."""
    return asyncio.run(_measure(url, workload))


async def _measure(url: str, workload: Workload) -> Timing:
    client = Client(url, "bench")
    began = time.perf_counter()
    sent = [client.generate(json.dumps(prompt), count) for prompt, count in workload]
    outcomes = [outcome for outcome, _ in await asyncio.gather(*sent)]
    client.close()
    for outcome in outcomes:
        assert outcome.failure is None, outcome.failure
        assert outcome.output_tokens == outcome.wanted_tokens, outcome
    wall = max(outcome.end_s for outcome in outcomes) - began
    ttft = statistics.mean(outcome.chunk_s[0] - outcome.sent_s for outcome in outcomes)
    gaps = [gap for outcome in outcomes for gap in latencies(outcome)["tpot"]]
    return Timing(wall, ttft, statistics.median(gaps) if gaps else 0.0)
