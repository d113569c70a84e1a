"""A crowd of clients, many of them rude: nothing is lost, nothing is mixed up, nothing grows."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import uvloop

from tests.soak.crowd import Account, End, report, run_crowd
from tests.soak.hash_texts import RequestMaker
from tests.soak.memory import WARM_REQUESTS, MemoryLog
from tests.soak.scale import SEED, scaled
from tests.support.server_process import ServerProcess, running, wait_until

MAX_GROWTH_MIB = 1.0  # per 10,000 requests
# Of the crowd's routes; `other` is one that does not exist.
ROUTES = {"/v1/completions", "/v1/chat/completions", "other"}
CLIENT_GONE = 499


def serve_a_crowd(
    server: ServerProcess, model_dir: Path, num_requests: int, num_clients: int
) -> tuple[Account, MemoryLog]:
    host, port = server.url.removeprefix("http://").split(":")
    family = {f"{p.cmdline()[-1]} {p.pid}": p for p in server.family}
    memory = MemoryLog({"supervisor": psutil.Process(server.popen.pid), **family})
    started = time.monotonic()
    account = uvloop.run(
        run_crowd(
            (host, int(port)),
            RequestMaker(model_dir),
            num_requests=num_requests,
            num_clients=num_clients,
            seed=SEED,
            watch=memory.add,
        )
    )
    print(report(account, started))
    return account, memory


def check_account(server: ServerProcess, account: Account, num_requests: int) -> None:
    """Each request has one end, and the server counts the same ones and holds nothing any more."""
    assert account.differences == []
    assert account.num_sent == account.num_ended == num_requests
    assert min(account.ends[end] for end in End) > 0
    with httpx.Client(base_url=server.url, timeout=30) as http:
        wait_until(lambda: load_of(http) == (0, 0, 0, 0))
        counted = counts_of(http)
        # What became of a cancelled request only the server knows, if it heard of it at all.
        only_there = counted - account.statuses
        assert account.statuses <= counted
        assert only_there.keys() <= {200, 503, CLIENT_GONE}
        assert only_there.total() <= account.ends[End.CANCELLED]
        assert http.post("/flush_cache").json()["success"]
    assert "Traceback" not in server.output


def load_of(http: httpx.Client) -> tuple[int, ...]:
    (load,) = http.get("/v1/loads").json()["loads"]
    names = ("num_open_reqs", "num_running_reqs", "num_waiting_reqs", "num_used_tokens")
    return tuple(load[name] for name in names)


def counts_of(http: httpx.Client) -> Counter[int]:
    """The responses of the crowd's routes by status."""
    counts: Counter[int] = Counter()
    pattern = r'minisrv:http_requests_total\{handler="([^"]*)".*status="(\d+)"\} (\S+)'
    for handler, status, count in re.findall(pattern, http.get("/metrics").text):
        if handler in ROUTES:
            counts[int(status)] += int(float(count))
    return counts


def test_every_request_of_a_small_crowd_is_accounted_for(model_dir: Path, socket_dir: Path) -> None:
    options = ("--model", str(model_dir), "--max-open-requests", "24")
    with running(*options, tmp_dir=socket_dir) as server:
        account, _ = serve_a_crowd(server, model_dir, 400, 40)
        assert account.statuses[503] > 0
        check_account(server, account, 400)


@pytest.mark.soak
def test_every_request_of_a_large_crowd_is_accounted_for_and_memory_stays_flat(
    model_dir: Path, socket_dir: Path
) -> None:
    num_requests = scaled(100_000)
    options = ("--model", str(model_dir), "--max-open-requests", "400")
    with running(*options, tmp_dir=socket_dir) as server:
        account, memory = serve_a_crowd(server, model_dir, num_requests, 500)
        print(f"MiB after each quarter, and per 10,000 requests: {memory.report()}")
        check_account(server, account, num_requests)
        if 3 * num_requests >= 4 * WARM_REQUESTS:
            growing = {n: mib for n, mib in memory.growth().items() if mib > MAX_GROWTH_MIB}
            assert growing == {}
