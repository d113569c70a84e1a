"""The records that the supervisor and its children exchange, one JSON object per line.

A child's stdin carries one `Boot`, then notices; its reports leave on a status pipe of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a child needs to know. Paths that are not needed, or not known yet, are empty.

    index: which one among the children of its kind. fds: inherited file descriptors by name.
    progress: the file in which it shows its progress.
    """

    config: dict[str, Any]
    run_dir: str
    epoch: int
    index: int
    status_fd: int
    parent_pid: int
    model_dir: str = ""
    tokenizer_dir: str = ""
    progress: str = ""
    fds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartProgress:
    """Child to supervisor, and on to the frontend: what a ReportProgress is called with."""

    phase: str
    fraction: float
    total: float = 0
    unit: str = ""


@dataclass(frozen=True, slots=True)
class ChildReady:
    """Child to supervisor: it serves, or has done its work. `facts`: what others need to know."""

    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChildFailed:
    """Child to supervisor, its last report: why it exits. `exit_code` 2 means a wrong option."""

    sentence: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class DrainBegun:
    """Frontend to supervisor: the server is to stop when no open request is left."""


@dataclass(frozen=True, slots=True)
class Drained:
    """Frontend to supervisor: a stop was requested, and no open request has to be waited for."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Supervisor to frontend: all other processes serve, in this epoch.

    facts: all of theirs, merged. suspects: uids that a process worked on when it died, since the
    last such notice. restarts: how often each kind of process has been started again.
    """

    facts: dict[str, Any]
    epoch: int = FIRST_EPOCH
    suspects: tuple[int, ...] = ()
    restarts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineLost:
    """Supervisor to frontend: a process has died, and an `EngineReady` will follow."""

    sentence: str


@dataclass(frozen=True, slots=True)
class EngineStalled:
    """Supervisor to frontend: a process makes no progress; `EngineReady` or `EngineLost` follows.

    An `EngineReady` of the same epoch means that it goes on with what it was doing.
    """

    sentence: str


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Supervisor to scheduler: the frontend has died, and with it all open requests."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Supervisor to frontend: refuse new requests, and report `Drained` when the others ended."""


@dataclass(frozen=True, slots=True)
class EngineEnded:
    """Supervisor to frontend: no further request will be answered.

    stopping: the end was requested; otherwise a process has died.
    """

    sentence: str
    stopping: bool


Report = StartProgress | ChildReady | ChildFailed | DrainBegun | Drained
Notice = (
    StartProgress
    | EngineReady
    | EngineLost
    | EngineStalled
    | NewEpoch
    | DrainRequested
    | EngineEnded
)
_RECORDS = {kind.__name__: kind for kind in (Boot, *get_args(Report), *get_args(Notice))}


def encode_line(record: Boot | Report | Notice) -> bytes:
    """The record as a line of JSON, with its line feed."""
    return json.dumps({"kind": type(record).__name__, **asdict(record)}).encode() + b"\n"


def decode_line(line: bytes) -> Any:
    """The record in a line from `encode_line`; both ends run the same version."""
    fields = json.loads(line)
    return _RECORDS[fields.pop("kind")](**fields)
