"""How long a step takes, from what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from minisrv.scheduler.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes, in counts.

    decodes: sequences of one token, which read `decode_context` cached tokens. prefill_tokens:
    prompt tokens of `chunks` sequences, which attend to `prefill_pairs` keys in all. samples:
    sequences that sample a token.
    """

    decodes: int
    decode_context: int
    chunks: int
    prefill_tokens: int
    prefill_pairs: int
    samples: int

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        """The work of a step."""
        decodes, chunks = len(plan.decodes), plan.prefills
        context = sum([request.num_computed for request in plan.decodes])
        if not chunks:
            return cls(decodes, context, 0, 0, 0, decodes)
        tokens = sum([chunk.length for chunk in chunks])
        pairs = sum([c.length * c.start + c.length * (c.length + 1) // 2 for c in chunks])
        samples = decodes + len(plan.sampling_prefills)
        return cls(decodes, context, len(chunks), tokens, pairs, samples)


class StepTimes(Protocol):
    """The times of an engine. A device computes steps one after another, beside the host."""

    def host_s(self, work: StepWork) -> float:
        """Seconds in which the scheduler process prepares and settles a step."""

    def device_s(self, work: StepWork) -> float:
        """Seconds that the engine computes a step."""
