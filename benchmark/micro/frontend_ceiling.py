"""Tokens per second through the frontend: python benchmark/micro/frontend_ceiling.py.

64 streams of chat chunks, one chunk per token (chunks are counted), with the client in its own
process. Behind the frontend there is first a process that answers at once, then the scheduler and
the detokenizer around an engine that costs nothing. A bare uvicorn application that sends the same
bytes is measured in the same run. The offered rate rises until chunks are late or merged: the
ceiling is the highest rate at which tokens arrived in time and at least 99.5% of them as their own
chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import httpx
import psutil

HERE = Path(__file__).parent / "frontend"
STREAMS = 64
RATES = (5_000, 10_000, 15_000, 20_000, 25_000, 30_000, 40_000, 60_000, 80_000)
SECONDS = 2.0
TARGET = 15_000
IN_TIME = 0.95  # of the rate offered
REPLACED = {
    "frontend only": {"tokenizer": "replay_tokenizer", "scheduler": "free_scheduler"},
    "scheduler, detokenizer, frontend": {"scheduler": "free_scheduler"},
}


@dataclass(frozen=True)
class Run:
    """One offered rate. cpu_us: CPU microseconds per token, by process; this one is the client."""

    offered: float
    reached: float
    merged: int
    cpu_us: dict[str, float]

    @property
    def kept_up(self) -> bool:
        """Whether tokens arrived in time, and at least 99.5% of them as their own chunk."""
        in_time = self.reached >= IN_TIME * self.offered
        return in_time and self.merged <= 0.005 * self.offered * SECONDS


@contextmanager
def bare_uvicorn() -> Iterator[str]:
    """The URL of the echo application."""
    command = [sys.executable, "-m", "uvicorn", "echo_app:app", "--app-dir", str(HERE)]
    command += ["--port", "0", "--loop", "uvloop", "--no-access-log"]
    with _process(command, r"http://[\d.:]+") as url:
        yield url


@contextmanager
def minisrv(replaced: dict[str, str]) -> Iterator[str]:
    """The URL of a server in which modules of this folder replace some processes."""
    program = (
        "import sys; from minisrv import launch_server; "
        "from minisrv.supervision import supervisor; "
        f"supervisor.MODULES.update({replaced!r}); sys.exit(launch_server.main())"
    )
    command = [sys.executable, "-c", program, "--port", "0", "--log-level", "warning"]
    with _process(command, r"http://\S+?(?=,)") as url:
        for _ in range(300):
            if httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                break
            time.sleep(0.1)
        else:
            raise TimeoutError("the server did not become ready")
        yield url


@contextmanager
def _process(command: list[str], pattern: str) -> Iterator[str]:
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        yield next(found[0] for line in process.stdout if (found := re.search(pattern, line)))
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=20)
        print(rest, end="", file=sys.stderr)


def measure(url: str, rate: float) -> Run:
    """Read STREAMS streams at `rate` tokens per second in total."""
    count = max(8, int(rate * SECONDS / STREAMS))
    before = _cpu_seconds()
    chunks, seconds = asyncio.run(_read_all(url, count, int(1e6 * STREAMS / rate)))
    after = _cpu_seconds()
    tokens = count * STREAMS
    return Run(
        offered=rate,
        reached=tokens / seconds,
        merged=tokens - chunks,
        cpu_us={name: (after[name] - before[name]) / tokens * 1e6 for name in after},
    )


def _cpu_seconds() -> dict[str, float]:
    found: dict[str, float] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        if process.status() == psutil.STATUS_ZOMBIE:
            continue
        name = _name(process)
        found[name] = found.get(name, 0.0) + sum(process.cpu_times()[:2])
    return found


def _name(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "client"
    command = process.cmdline()
    if "uvicorn" in command:
        return "uvicorn"
    return command[-1].removeprefix("minisrv.") if "-P" in command else "supervisor"


async def _read_all(url: str, count: int, period_us: int) -> tuple[int, float]:
    """The number of chunks with content, and seconds from the very first byte to the last."""
    streams = await asyncio.gather(*(_Stream.read(url, count, period_us) for _ in range(STREAMS)))
    first = min(stream.first for stream in streams)
    return sum(s.chunks for s in streams), max(s.last for s in streams) - first


class _Stream(asyncio.Protocol):
    """Counts chunks without parsing them: on two cores a heavy client would distort the result."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.chunks = 0
        self.first = self.last = 0.0
        self.done = asyncio.get_running_loop().create_future()

    @classmethod
    async def read(cls, url: str, count: int, period_us: int) -> _Stream:
        """Send one request and read its stream to the end."""
        fields = {"max_tokens": count, "seed": period_us, "stream": True, "ignore_eos": True}
        body = json.dumps({**fields, "messages": [{"role": "user", "content": "a"}]}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        host, port = url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(head.encode() + body), host, int(port))
        await stream.done
        return stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request as soon as the connection is open."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count the chunks in `data`; a mark may be split between two reads."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        text = self._tail + data
        self.chunks += text.count(_MARK)
        self._tail = text[-(len(_MARK) - 1) :]

    def connection_lost(self, exc: Exception | None) -> None:
        """Finish the count at the end of the stream."""
        self.chunks -= 1  # the first chunk has only the role
        self.done.set_result(None)


_MARK = b'"content":"'


def ceiling(url: str) -> tuple[Run, Run]:
    """The run at the highest sustained rate, and the one after it."""
    measure(url, 2_000)
    best = measure(url, 2_500)
    for rate in RATES:
        run = max((measure(url, rate) for _ in range(2)), key=lambda r: (r.kept_up, r.reached))
        if not run.kept_up:
            return best, run
        best = run
    return best, best


def page(rows: dict[str, tuple[Run, Run]]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Frontend ceiling, {date.today()}",
        "",
        f"`python benchmark/micro/frontend_ceiling.py`: {STREAMS} streams of chat chunks, one per "
        f"token, the client in its own process. {os.cpu_count()} cores of {platform.machine()}, "
        f"Python {platform.python_version()}.",
        "",
        "| what | sustained tokens/s | next rate: reached, merged | CPU us per token |",
        "|---|---|---|---|",
    ]
    for name, (best, over) in rows.items():
        cpu = ", ".join(f"{part} {us:.0f}" for part, us in best.cpu_us.items() if us >= 0.5)
        lines.append(
            f"| {name} | {best.reached:,.0f} | {over.offered:,.0f}: {over.reached:,.0f}, "
            f"{over.merged} | {cpu} |"
        )
    reached = rows["frontend only"][0].reached
    verdict = "met" if reached >= TARGET * IN_TIME else "missed"
    lines += ["", f"Target: {TARGET:,} tokens per second through the frontend only, {verdict}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent.parent / f"results/frontend_ceiling_{date.today()}.md"
    parser.add_argument("--results", type=Path, default=default)
    results = parser.parse_args().results
    rows = {}
    with bare_uvicorn() as url:
        rows["bare uvicorn"] = ceiling(url)
    for name, replaced in REPLACED.items():
        with minisrv(replaced) as url:
            rows[name] = ceiling(url)
    text = page(rows)
    print(text)
    results.write_text(text)


if __name__ == "__main__":
    main()
