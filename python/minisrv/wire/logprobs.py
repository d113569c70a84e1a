"""Log-probabilities: as columns in messages, and one token at a time for readers.

The scheduler sends `TokenLogprobs`, by token id. The detokenizer makes `SpelledLogprobs` of them,
with the tokens' bytes, for the frontend. Both give single tokens when iterated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from minisrv.wire.arrays import Float32Array, Int32Array

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest tokens in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SpelledLogprob:
    """The same with the bytes of the tokens, and where in the text this one begins."""

    spelling: bytes
    logprob: float
    offset: int
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of N consecutive tokens of a request, and of the K likeliest in each place.

    The K of a place are best first; those of all places follow one another.
    """

    uid: int
    token_ids: Int32Array  # [N]
    logprobs: Float32Array  # [N]
    top_ids: Int32Array  # [N * K]
    top_logprobs: Float32Array  # [N * K]

    def __iter__(self) -> Iterator[TokenLogprob]:
        ids = self.token_ids.tolist()
        top = _by_place(len(ids), self.top_ids.tolist(), self.top_logprobs)
        return map(TokenLogprob, ids, self.logprobs.tolist(), top)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpelledLogprobs:
    """Log-probabilities of N tokens of a text, and of the K likeliest in each place, best first.

    A token is an index into `spellings`: bytes, perhaps a part of a character. offsets: where each
    token begins in the text, in characters. A prompt's first token has NaN; its K mean nothing.
    """

    uid: int
    spellings: tuple[bytes, ...]
    tokens: Int32Array  # [N]
    logprobs: Float32Array  # [N]
    offsets: Int32Array  # [N]
    top_tokens: Int32Array  # [N * K]
    top_logprobs: Float32Array  # [N * K]

    def __iter__(self) -> Iterator[SpelledLogprob]:
        spellings = [self.spellings[token] for token in self.tokens.tolist()]
        others = [self.spellings[token] for token in self.top_tokens.tolist()]
        top = _by_place(len(spellings), others, self.top_logprobs)
        return map(SpelledLogprob, spellings, self.logprobs.tolist(), self.offsets.tolist(), top)


def _by_place(
    num_places: int, tokens: Sequence[T], logprobs: Float32Array
) -> Iterator[tuple[tuple[T, float], ...]]:
    pairs = list(zip(tokens, logprobs.tolist(), strict=True))
    num_top = len(pairs) // max(1, num_places)
    return (tuple(pairs[i * num_top : (i + 1) * num_top]) for i in range(num_places))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """The text of a prompt, which precedes its output, and its log-probabilities if asked for."""

    uid: int
    text: str
    logprobs: SpelledLogprobs | None = None
