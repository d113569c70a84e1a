"""Log-probabilities in messages: by token id from the scheduler, spelled for the frontend."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.wire.arrays import Float32Array, Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of N tokens of a request in a row, and of the K likeliest in each place.

    The K of a place are best first, those of all places one after the other.
    """

    uid: int
    token_ids: Int32Array  # [N]
    logprobs: Float32Array  # [N]
    top_ids: Int32Array  # [N * K]
    top_logprobs: Float32Array  # [N * K]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpelledLogprobs:
    """Log-probabilities of N tokens of a text, and of the K likeliest in each place, best first.

    A token is an index into `spellings`: bytes, maybe a part of a character. offsets: where in the
    text each begins, in characters. A prompt's first token has NaN; its K mean nothing.
    """

    spellings: tuple[bytes, ...]
    tokens: Int32Array  # [N]
    logprobs: Float32Array  # [N]
    offsets: Int32Array  # [N]
    top_tokens: Int32Array  # [N * K]
    top_logprobs: Float32Array  # [N * K]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLogprobs:
    """Scores of a request's tokens, from where the last ones ended."""

    uid: int
    logprobs: tuple[SpelledLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEcho:
    """The text of a prompt, in front of what its request puts out; `scores` if asked for."""

    uid: int
    text: str
    logprobs: SpelledLogprobs | None = None
