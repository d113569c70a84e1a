"""What every route works with."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.config import ServerConfig
from minisrv.frontend.generation.run import Runner
from minisrv.frontend.http.body import BodyReader
from minisrv.frontend.registry.registry import RequestRegistry


@dataclass(frozen=True, slots=True)
class Service:
    """config: of the server. registry: the model, and the way to the other processes.

    bodies: reads request bodies. runner: answers generation requests.
    """

    config: ServerConfig
    registry: RequestRegistry
    bodies: BodyReader
    runner: Runner
