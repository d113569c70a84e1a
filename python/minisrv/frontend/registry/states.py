"""The states of the server, as its frontend sees them."""

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
class Restarting:
    """A process has died; requests are kept until it serves again. sentence: what happened."""

    model: ModelInfo
    sentence: str


@dataclass(frozen=True, slots=True)
class Draining:
    """Open requests may end; further ones are refused."""

    model: ModelInfo


@dataclass(frozen=True, slots=True)
class Dead:
    error: MinisrvError


State = Starting | Serving | Restarting | Draining | Dead
