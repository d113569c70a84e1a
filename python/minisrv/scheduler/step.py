"""What the scheduler decided for one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.scheduler.request import Request


@dataclass(slots=True)
class Chunk:
    """The tokens start .. start + length of a request, computed in one step."""

    request: Request
    start: int
    length: int


@dataclass(slots=True)
class Step:
    """Decodes of one token first, each the position before its request's `computed`, then chunks.

    All decodes get a token, and the chunks that end their prompt: `sampling_prefills` are indices
    into `prefills`. The log-probabilities of the prompt are wanted of the chunks `scored`.
    Of the chunks `watched` somebody wants to know when they are done.
    """

    step_id: int
    decodes: list[Request] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    sampling_prefills: list[int] = field(default_factory=list)
    page_writes: dict[tuple[int, int], int] = field(default_factory=dict)
    scored: list[Chunk] = field(default_factory=list)
    watched: list[Chunk] = field(default_factory=list)

    @property
    def samples(self) -> list[Request]:
        """The requests that get a token, in order."""
        return self.decodes + [self.prefills[i].request for i in self.sampling_prefills]
