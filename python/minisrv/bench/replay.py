"""A trace as conversations that can be sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minisrv.bench.prompts import Segment
from minisrv.bench.traces import BLOCK_TOKENS, TraceRequest
from minisrv.bench.workloads import Conversation, Turn

# The first number of a segment's key; those of other workloads are smaller.
_BLOCK, _OWN = 10, 11


@dataclass(frozen=True, slots=True)
class Replay:
    """requests: in the order of arrival. speed: how much faster than recorded they arrive.

    divisor: of all lengths, a power of two up to BLOCK_TOKENS; for models with a short context.
    """

    requests: Sequence[TraceRequest]
    speed: float = 1.0
    divisor: int = 1

    def conversations(self, seed: Sequence[int]) -> list[Conversation]:
        """One for each session and each request without one; other seeds give other tokens.

        Equal blocks become equal tokens. The prompt of a session's later turn holds the turns and
        answers before it; the trace says how long it is in all.
        """
        sessions: dict[str | int, list[TraceRequest]] = {}
        for number, request in enumerate(self.requests):
            key = number if request.session is None else request.session
            sessions.setdefault(key, []).append(request)
        return [
            Conversation(tuple(self._turns(talk, (*seed, i))), talk[0].arrival_s / self.speed)
            for i, talk in enumerate(sessions.values())
        ]

    def _turns(self, talk: Sequence[TraceRequest], seed: Sequence[int]) -> Iterator[Turn]:
        before = 0  # tokens of the prompt that earlier turns have brought
        for number, request in enumerate(talk):
            length = self._divide(request.input_tokens)
            if request.block_ids:
                # A block has the same tokens in whatever request it is.
                segments = tuple(self._blocks(request.block_ids, length, seed[:-1]))
            else:
                own = max(1, length - before)
                segments = (Segment((_OWN, *seed, number), own),)
            output = self._divide(request.output_tokens)
            yield Turn(segments, output, arrival_s=request.arrival_s / self.speed)
            before = max(length, before + 1) + output

    def _blocks(
        self, block_ids: Sequence[int], length: int, seed: Sequence[int]
    ) -> Iterator[Segment]:
        size = BLOCK_TOKENS // self.divisor
        for number, block in enumerate(block_ids):
            if (left := length - number * size) > 0:
                yield Segment((_BLOCK, *seed, block), min(size, left))

    def _divide(self, num_tokens: int) -> int:
        return max(1, num_tokens // self.divisor)
