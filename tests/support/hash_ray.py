"""minisrv.ray with the hash scheduler in each replica.

With MINISRV_TEST_RECORD each replica appends a line to this file when it is sent a request with an
X-Request-Id, and one for each piece of its response: the id, the bytes, the CLOCK_MONOTONIC time.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve import Application

from minisrv.ray.application import make_application
from minisrv.ray.replica import Replica
from minisrv.supervision import supervisor


class HashReplica(Replica):
    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]
        supervisor.MODULES["scheduler"] = "tests.support.hash_scheduler"
        path = os.environ.get("MINISRV_TEST_RECORD", os.devnull)
        self._record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        await super().__init__(options)

    async def handle(self, call: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        request_id = dict(call["scope"]["headers"]).get(b"x-request-id", b"")
        self._note("sent", request_id)
        async for message in super().handle(call):
            if body := message.get("body"):
                self._note("piece", request_id, len(body))
            yield message

    def _note(self, what: str, request_id: bytes, num_bytes: int = 0) -> None:
        if request_id:
            line = f"{what} {request_id.decode()} {num_bytes} {time.monotonic()}\n"
            os.write(self._record, line.encode())


def build(args: dict[str, Any]) -> Application:
    """For `serve run`, or serve.run."""
    return make_application(args, HashReplica)
