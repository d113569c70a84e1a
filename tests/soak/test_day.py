"""Twenty minutes of conversations with a death every minute: nothing is lost, nothing grows.

SOAK_TRACE names the file of a trace (tests/soak/trace.py), SOAK_DAY_RESULTS one for the samples,
of which scripts/plot_day.py makes a picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

import httpx
import psutil
import pytest

from tests.soak.memory import MIB
from tests.soak.scale import SCALE
from tests.soak.trace import Arrival, read_trace
from tests.support.server_process import ServerProcess, running, status_of

SECONDS = 1200.0
REQUESTS_PER_S = 2.5
KILL_EVERY_S = 60.0
SAMPLE_EVERY_S = 2.0
KINDS = ("scheduler", "detokenizer", "tokenizer", "frontend")
MAX_GROWTH_MIB = 16.0  # of a kind's largest process, from the first third of the time to the last
MORE_FDS = 3  # from an idle server at the start to one at the end


@dataclass
class Day:
    """samples: seconds, kind, MiB and file descriptors. kills: seconds, kind, seconds until ready.

    pauses: the longest gap of each stream, in seconds.
    """

    samples: list[tuple[float, str, float, int]] = field(default_factory=list)
    kills: list[tuple[float, str, float]] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=lambda: {"completed": 0, "broken": 0})
    pauses: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def values(self, kind: str, column: int, since: float, until: float) -> list[float]:
        """The samples of a kind in a part of the time: MiB (2) or descriptors (3)."""
        return [float(s[column]) for s in self.samples if s[1] == kind and since <= s[0] < until]


async def ask(client: httpx.AsyncClient, arrival: Arrival, number: int, day: Day) -> None:
    """Send one request; after a broken connection again, as the clients of OpenAI do."""
    body = {"prompt": arrival.prompt, "max_tokens": arrival.num_tokens, "ignore_eos": True}
    body |= {"stream": True, "seed": number, "stream_options": {"include_usage": True}}
    for _ in range(5):
        try:
            await read_stream(client, body, day)
        except httpx.HTTPError:
            day.ends["broken"] += 1
            await asyncio.sleep(0.5)
        else:
            day.ends["completed"] += 1
            return
    day.wrong.append(f"request {number} was broken five times")


async def read_stream(client: httpx.AsyncClient, body: dict[str, object], day: Day) -> None:
    last, gap, counted = time.monotonic(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            day.wrong.append(f"{response.status_code}: {(await response.aread())[:200]!r}")
            return
        async for line in response.aiter_lines():
            gap, last = max(gap, time.monotonic() - last), time.monotonic()
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    day.wrong.append(line[:300])
                elif chunk.get("usage"):
                    counted = chunk["usage"]["completion_tokens"]
    day.pauses.append(gap)
    if counted != body["max_tokens"]:
        day.wrong.append(f"{counted} tokens instead of {body['max_tokens']}")


def sample_once(server: ServerProcess, began: float, day: Day) -> None:
    supervisor = psutil.Process(server.popen.pid)
    for process in [supervisor, *supervisor.children()]:
        with contextlib.suppress(psutil.Error):
            module = process.cmdline()[-1]
            kind = module.removeprefix("minisrv.") if process != supervisor else "supervisor"
            mib = process.memory_info().rss / MIB
            day.samples.append((time.monotonic() - began, kind, mib, process.num_fds()))


async def sample(server: ServerProcess, began: float, day: Day) -> None:
    while True:
        sample_once(server, began, day)
        await asyncio.sleep(SAMPLE_EVERY_S)


async def kill_now_and_then(server: ServerProcess, began: float, day: Day) -> None:
    for number, kind in enumerate(cycle(KINDS), 1):
        await asyncio.sleep(began + number * KILL_EVERY_S - time.monotonic())
        server.child(kind).kill()
        killed = time.monotonic()
        await asyncio.sleep(0.05)
        while await asyncio.to_thread(status_of, f"{server.url}/ready") != 200:
            await asyncio.sleep(0.02)
        day.kills.append((killed - began, kind, time.monotonic() - killed))


async def live(server: ServerProcess, arrivals: list[Arrival], day: Day) -> None:
    began = time.monotonic()
    sample_once(server, began, day)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        others = [
            asyncio.create_task(sample(server, began, day)),
            asyncio.create_task(kill_now_and_then(server, began, day)),
        ]
        asked = []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
            asked.append(asyncio.create_task(ask(client, arrival, number, day)))
        await asyncio.gather(*asked)
        for other in others:
            other.cancel()
    await asyncio.to_thread(server.wait_until_ready)
    await asyncio.sleep(1)
    sample_once(server, began, day)


@pytest.mark.soak
def test_nothing_is_lost_and_nothing_grows_in_a_day_of_deaths(socket_dir: Path) -> None:
    seconds = SECONDS * SCALE
    arrivals = read_trace(os.environ.get("SOAK_TRACE"), int(REQUESTS_PER_S * seconds), seconds)
    day = Day()
    with running("--model", "demo", tmp_dir=socket_dir, hash_engine=False) as server:
        asyncio.run(live(server, arrivals, day))
        if path := os.environ.get("SOAK_DAY_RESULTS"):
            Path(path).write_text(json.dumps(asdict(day)))
        print(json.dumps({"ends": day.ends, "kills": day.kills, "wrong": day.wrong[:5]}))
        server.popen.terminate()
        assert server.wait() == 0
    assert day.wrong == []
    assert day.ends["completed"] == len(arrivals)
    assert day.ends["broken"] == 0 or any(kind == "frontend" for _, kind, _ in day.kills)
    assert len(day.kills) >= int(seconds / KILL_EVERY_S) - 1
    pauses = sorted(day.pauses)
    print({f"p{p}": round(pauses[len(pauses) * p // 100], 3) for p in (50, 90, 99)}, pauses[-1])
    for kind in ("supervisor", *KINDS):
        early = max(day.values(kind, 2, 0, seconds / 3))
        late = max(day.values(kind, 2, seconds * 2 / 3, 2 * seconds))
        fds = day.values(kind, 3, 0, 2 * seconds)
        print(f"{kind}: {early:.0f} to {late:.0f} MiB, {fds[0]:.0f} to {fds[-1]:.0f} descriptors")
        assert late <= early + MAX_GROWTH_MIB, kind
        assert fds[-1] <= fds[0] + MORE_FDS, kind
