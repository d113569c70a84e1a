"""A real Prometheus scrapes a real run; every query of the dashboard returns data."""

from __future__ import annotations

import math
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from minisrv.commands.dashboard import make_dashboard
from tests.support.server_process import OpenRequest, ServerProcess, running, wait_until

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus here"),
]

ARGUMENTS = ("--model", "demo", "--num-threads", "1", "--max-open-requests", "4", "--no-resume")
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: minisrv
    static_configs: [{{targets: ["{target}"]}}]
"""
# What Grafana replaces by at least four scrapes; here, by the whole run.
RANGE = "10m"


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """The URL of one that scrapes `target` every second."""
    folder.mkdir()
    (folder / "prometheus.yml").write_text(CONFIG.format(target=target))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    """The series of a query; fails if Prometheus refuses it."""
    reply = httpx.get(f"{url}/api/v1/query", params={"query": query}).json()
    assert reply["status"] == "success", (query, reply)
    result: list[dict[str, Any]] = reply["data"]["result"]
    return result


def scraped(url: str) -> bool:
    try:
        return bool(ask(url, "minisrv:generation_tokens_total"))
    except (httpx.HTTPError, ValueError):
        return False


def make_events(server: ServerProcess) -> None:
    """Whatever the panels show: answers, a refusal, a death with an open request."""
    question = {"messages": [{"role": "user", "content": "What is 58 + 67?"}], "store": True}
    for _ in range(20):
        httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=60)
    streams = [OpenRequest(server.url, stream=True) for _ in range(4)]
    for stream in streams:
        stream.wait_for_text()
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=60)
    assert refused.status_code == 503
    server.child("scheduler").send_signal(signal.SIGKILL)
    for stream in streams:
        stream.join()
    server.wait_until_ready()
    assert httpx.post(f"{server.url}/v1/chat/completions", json=question).status_code == 200


def test_every_query_returns_data(tmp_path: Path) -> None:
    with running(*ARGUMENTS, tmp_dir=tmp_path / "t", hash_engine=False) as server:
        target = server.url.removeprefix("http://")
        with prometheus(target, tmp_path / "prometheus") as url:
            wait_until(lambda: scraped(url))
            make_events(server)
            time.sleep(5)  # a rate needs two scrapes
            empty, shown = [], {}
            for panel in make_dashboard()["panels"]:
                for asked in panel.get("targets", ()):
                    query = asked["expr"].replace("$instance", ".*")
                    series = ask(url, query.replace("$__rate_interval", RANGE))
                    values = [float(one["value"][1]) for one in series]
                    numbers = [value for value in values if not math.isnan(value)]
                    shown[panel["title"], asked["legendFormat"]] = numbers
                    print(f"{panel['title']}: {asked['legendFormat']}: {values}")
                    if not numbers:
                        empty.append(query)
    assert not empty
    assert shown["Refused with 503 since the start, by limit", "{{reason}}"] == [1]
    assert shown["Processes started again since the start", "{{process}}"] == [1]
    assert shown["Requests over a restart", "given up: {{reason}}"] == [4]
