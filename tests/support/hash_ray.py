"""minisrv.ray with the hash scheduler in each replica."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from minisrv.ray.application import make_application
from minisrv.ray.replica import Replica
from minisrv.supervision import supervisor


class HashReplica(Replica):
    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]
        supervisor.MODULES["scheduler"] = "tests.support.hash_scheduler"
        await super().__init__(options)


def build(args: dict[str, Any]) -> Application:
    """For `serve run`, or serve.run."""
    return make_application(args, HashReplica)
