"""The workloads: what is sent, in conversations of one or more turns. All randomness has a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from minisrv.bench.prompts import Segment
from minisrv.errors import ConfigError

# The first number of a segment's key, and of the keys of the other draws.
_PREFIX, _OWN, _SHAPE, _ARRIVALS = range(4)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. think_s: from the end of the last reply until it is sent.

    arrival_s: when it is sent, if arrivals are planned and the last reply has ended by then; since
    the start. None: after think_s.
    """

    segments: tuple[Segment, ...]
    output_tokens: int
    think_s: float = 0.0
    arrival_s: float | None = None

    @property
    def input_tokens(self) -> int:
        """Tokens that this turn adds to the conversation."""
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other; each prompt holds all turns and answers before it.

    arrival_s: when the first is sent, since the start, if arrivals are planned.
    """

    turns: tuple[Turn, ...]
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from `low` to `high`, equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Range:
        """Of "128" or "64-256". Raises ConfigError."""
        low, _, high = text.partition("-")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.low <= found.high:
            raise ConfigError(f"{text} is neither a number such as 128 nor a range such as 64-256")
        return found

    def draw(self, rng: np.random.Generator) -> int:
        """One of the numbers."""
        return int(rng.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class Shape:
    """How synthetic requests look.

    input_tokens, output_tokens: of each turn. prefix_tokens: that come before the first turn, and
    that conversations share; there are `prefixes` different ones. think_s: mean pause before each
    further turn, exponentially distributed.
    """

    input_tokens: Range
    output_tokens: Range
    prefix_tokens: int = 0
    prefixes: int = 1
    turns: Range = Range(1, 1)
    think_s: float = 0.0


def make_conversations(shape: Shape, num_requests: int, seed: Sequence[int]) -> list[Conversation]:
    """Conversations with `num_requests` turns in all. Other seeds give other tokens."""
    rng = np.random.default_rng((_SHAPE, *seed))
    return list(_conversations(shape, num_requests, seed, rng))


def _conversations(
    shape: Shape, left: int, seed: Sequence[int], rng: np.random.Generator
) -> Iterator[Conversation]:
    number = 0
    while left > 0:
        prefix: tuple[Segment, ...] = ()
        if shape.prefix_tokens:
            key = (_PREFIX, *seed, int(rng.integers(shape.prefixes)))
            prefix = (Segment(key, shape.prefix_tokens),)
        turns = []
        for turn in range(min(left, shape.turns.draw(rng))):
            own = Segment((_OWN, *seed, number, turn), shape.input_tokens.draw(rng))
            think_s = float(rng.exponential(shape.think_s)) if turn and shape.think_s else 0.0
            segments = (own,) if turn else (*prefix, own)
            turns.append(Turn(segments, shape.output_tokens.draw(rng), think_s))
        yield Conversation(tuple(turns))
        left -= len(turns)
        number += 1


def with_arrivals(
    conversations: Sequence[Conversation], rate: float, poisson: bool, seed: Sequence[int]
) -> list[Conversation]:
    """The same with arrivals at `rate` per second: evenly, or as a Poisson process."""
    rng = np.random.default_rng((_ARRIVALS, *seed))
    gaps = np.full(len(conversations), 1 / rate)
    if poisson:
        gaps = rng.exponential(1 / rate, len(conversations))
    arrivals = np.cumsum(gaps) - gaps[:1]
    return [
        Conversation(
            tuple(replace(turn, arrival_s=None) for turn in conversation.turns), float(arrival)
        )
        for conversation, arrival in zip(conversations, arrivals, strict=True)
    ]
