"""Replicas on a Ray of their own, and clients that load them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.soak.raw_http import BrokenReply, Connection, Reply, json_request
from tests.support.server_process import PYTHONPATH, free_port

HANG_S = 90
NAME = "minisrv"


@dataclass
class Fleet:
    """record: what the replicas note (see hash_ray)."""

    port: int
    model_dir: Path
    record: Path

    def deploy(self, **args: Any) -> None:
        """Start or change the replicas; returns when they serve."""
        from ray import serve

        from tests.support import hash_ray

        options = {"model": str(self.model_dir), "num_cpus": 0.1, "drain_timeout": 30}
        serve.run(hash_ray.build({**options, **args}), name=NAME)

    def remove(self) -> None:
        from ray import serve

        serve.delete(NAME)

    def notes(self, what: str) -> list[tuple[str, int, float]]:
        """Request id, bytes and time of each line of this kind."""
        lines = [line.split() for line in self.record.read_text().splitlines()]
        return [(id, int(size), float(at)) for kind, id, size, at in lines if kind == what]


@contextlib.contextmanager
def fleet(tmp_path: Path, model_dir: Path, **variables: Any) -> Iterator[Fleet]:
    """A cluster without replicas. variables: of tests.support.hash_scheduler."""
    import ray
    from ray import serve

    record, port = tmp_path / "record", free_port()
    record.touch()
    values = {f"MINISRV_TEST_{name.upper()}": str(value) for name, value in variables.items()}
    values |= {"MINISRV_TEST_RECORD": str(record), "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    before = dict(os.environ)
    os.environ.update(values)
    try:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": values},
        )
        serve.start(http_options={"port": port})
        yield Fleet(port, model_dir, record)
    finally:
        serve.shutdown()
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def replica_processes() -> list[psutil.Process]:
    """The actors of the replicas, without the ingress."""
    title = f"ray::ServeReplica:{NAME}:minisrv"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


@dataclass
class Answer:
    """pieces_at: when each part of a stream came, by CLOCK_MONOTONIC, and ends_at: how many bytes
    there were with it. fault: what went wrong.
    """

    request_id: str
    sent_at: float
    reply: Reply
    pieces_at: list[float]
    ends_at: list[int]
    fault: str = ""

    @property
    def ttft_s(self) -> float:
        return self.pieces_at[0] - self.sent_at

    def events(self) -> list[Any]:
        """Of a stream that has ended."""
        return [json.loads(event) for event in self.reply.events if event != "[DONE]"]


async def ask(port: int, request_id: str, body: dict[str, Any]) -> Answer:
    """Send a completion request and read what comes."""
    answer = Answer(request_id, time.monotonic(), Reply(0, {}), [], [])
    try:
        async with asyncio.timeout(HANG_S):
            with await Connection.open("127.0.0.1", port) as connection:
                headers = {"X-Request-Id": request_id}
                await connection.send(json_request("/v1/completions", body, **headers))
                answer.reply = await connection.read_head()
                async for piece in connection.chunks(answer.reply):
                    if piece.startswith(b"data: "):
                        answer.pieces_at.append(time.monotonic())
                        answer.ends_at.append(len(answer.reply.body))
    except TimeoutError:
        answer.fault = "hung"
    except (BrokenReply, OSError) as error:
        answer.fault = f"broken: {error}"
    return answer
