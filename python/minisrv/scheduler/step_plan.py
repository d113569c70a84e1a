"""The plan of one step, and what settling it brought."""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.scheduler.request import Request


@dataclass(slots=True)
class Chunk:
    """Positions start .. start + length of a request's `prefill_ids`, computed in one step."""

    request: Request
    start: int
    length: int


@dataclass(slots=True, repr=False)
class StepPlan:
    """One token of each decode, longest first, then the prefill chunks, in the order of the batch.

    The token that a decode computes is at position `num_computed - 1` of its request.
    `sampling_prefills` are the indices in `prefills` of the chunks that end their prompt: these
    sample a token, as all decodes do. `page_writes` maps (row, column) of the page table to a page.
    `scored` are the chunks whose prompt logprobs are wanted, `watched` those whose progress is
    reported.
    """

    step_id: int
    scheduled_at: float
    decodes: list[Request] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    sampling_prefills: list[int] = field(default_factory=list)
    page_writes: dict[tuple[int, int], int] = field(default_factory=dict)
    scored: list[Chunk] = field(default_factory=list)
    watched: list[Chunk] = field(default_factory=list)
    has_preempted: bool = False

    @property
    def ending_prompts(self) -> list[Request]:
        """The requests that sample after a chunk, in order."""
        return [self.prefills[i].request for i in self.sampling_prefills]

    @property
    def samples(self) -> list[Request]:
        """The requests that sample a token, in order."""
        return self.decodes + self.ending_prompts

    @property
    def num_tokens(self) -> int:
        """How many positions the step computes."""
        return len(self.decodes) + sum([chunk.length for chunk in self.prefills])

    def __repr__(self) -> str:
        decodes = [request.uid for request in self.decodes]
        chunks = [f"{c.request.uid}[{c.start}:{c.start + c.length}]" for c in self.prefills]
        return f"<StepPlan {self.step_id} decodes {decodes} prefills [{', '.join(chunks)}]>"


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Which tokens of a settled step count: those appended to a request.

    Not those of requests that had ended before, wanted no token, or failed with this one.
    `num_decoded` are those of decodes. `resumed_after_s`: for each request that continues after a
    preemption, the seconds since then.
    """

    num_tokens: int
    num_decoded: int
    resumed_after_s: list[float]
