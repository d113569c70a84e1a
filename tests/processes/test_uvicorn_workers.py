"""`uvicorn minisrv.asgi:app` as people start it: its log, and more than one worker."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from minisrv.supervision.sole_worker import SoleWorker
from tests.support.server_process import environment, free_port, module_of, status_of, wait_until

STANDS_BY = "another worker runs the engine, and this one stands by"


class Uvicorn:
    def __init__(self, model_dir: Path, tmp_dir: Path, *arguments: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.tmp_dir = tmp_dir
        self._log_path = tmp_dir.with_suffix(".log")
        variables = environment(MINISRV_MODEL=str(model_dir), TMPDIR=str(tmp_dir))
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "uvicorn", "tests.support.hash_asgi:app"),
                    *("--port", str(port), *arguments),
                ],
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log_path.read_text()

    @property
    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def schedulers(self) -> list[psutil.Process]:
        return [one for one in self.family if module_of(one) == "tests.support.hash_scheduler"]

    def wait_until_ready(self) -> None:
        wait_until(lambda: status_of(f"{self.url}/ready") == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.output


@contextlib.contextmanager
def running(model_dir: Path, tmp_dir: Path, *arguments: str) -> Iterator[Uvicorn]:
    """A server that is ready, stopped at the end: nothing may be left of it."""
    server = Uvicorn(model_dir, tmp_dir, *arguments)
    family: list[psutil.Process] = []
    try:
        server.wait_until_ready()
        yield server
        family = server.family
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, alive
        assert not list(tmp_dir.glob("*.lock"))
        assert "Traceback" not in server.output
    finally:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        server.process.kill()
        server.process.wait()


def test_each_request_is_logged_once(model_dir: Path, socket_dir: Path) -> None:
    socket_dir.mkdir()
    with running(model_dir, socket_dir) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
    lines = [line for line in server.output.splitlines() if "/v1/models" in line]
    assert len(lines) == 1, lines
    assert "GET /v1/models status=200" in lines[0]
    assert "/ready" not in server.output


def test_of_two_workers_one_runs_the_engine(model_dir: Path, socket_dir: Path) -> None:
    socket_dir.mkdir()
    with running(model_dir, socket_dir, "--workers", "2") as server:
        wait_until(lambda: STANDS_BY in server.output)
        assert len(server.schedulers) == 1
        for _ in range(10):  # on connections of their own
            assert httpx.get(f"{server.url}/v1/models").status_code == 200
    assert server.output.count(STANDS_BY) == 1


@pytest.mark.soak
def test_a_worker_that_stands_by_takes_the_place_of_one_that_died(
    model_dir: Path, socket_dir: Path
) -> None:
    socket_dir.mkdir()
    with running(model_dir, socket_dir, "--workers", "2") as server:
        wait_until(lambda: STANDS_BY in server.output)
        (scheduler,) = server.schedulers
        worker = next(one for one in scheduler.parents() if one.ppid() == server.process.pid)
        worker.kill()
        wait_until(lambda: server.output.count(STANDS_BY) == 2)
        server.wait_until_ready()
        (other,) = server.schedulers
        assert other != scheduler
        # As a terminal sends it: to all processes.
        for process in psutil.Process(server.process.pid).children():
            process.send_signal(signal.SIGINT)


_HOLDER = """
import sys, time
from minisrv.supervision.sole_worker import SoleWorker
assert SoleWorker(1234).take()
print("taken", flush=True)
time.sleep(60)
"""


def test_the_place_of_a_worker_that_died_is_free(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_dir.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(socket_dir))
    place = SoleWorker(1234)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        env=environment(TMPDIR=str(socket_dir)),
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    with holder, holder.stdout as stdout:
        assert stdout.readline() == b"taken\n"
        assert not place.take()
        assert SoleWorker(5678).take()  # of another server
        holder.kill()
    assert place.take()
    assert not SoleWorker(1234).take()
    place.leave()
    assert SoleWorker(1234).take()


def test_a_signal_ends_the_wait_for_a_place(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_dir.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(socket_dir))
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        place, waiting = SoleWorker(1), SoleWorker(1)
        assert place.take()

        async def wait() -> bool:
            asyncio.get_running_loop().call_later(0.1, signal.raise_signal, signal.SIGTERM)
            return await waiting.wait()

        assert not asyncio.run(wait())
        assert noted == [signal.SIGTERM]  # its handler ran too, and is the handler again
        signal.raise_signal(signal.SIGTERM)
        assert len(noted) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
        place.leave()
