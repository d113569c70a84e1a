"""How far the server is: starting, serving or dead."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.errors import MinisrvError
from minisrv.frontend.registry.model_info import ModelInfo


@dataclass(frozen=True, slots=True)
class Starting:
    """The model is being loaded; `fraction` of `phase` is done, 0 to 1."""

    phase: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Serving:
    model: ModelInfo


@dataclass(frozen=True, slots=True)
class Dead:
    """Nothing will be served any more, and why."""

    error: MinisrvError


State = Starting | Serving | Dead
