"""Log probabilities in OpenAI's two shapes: of a chat completion, and of a completion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minisrv.wire.logprobs import SpelledLogprobs


@dataclass(frozen=True, slots=True)
class _Place:
    """One token with its log probability, NaN for a prompt's first, and the likeliest there."""

    spelling: bytes
    logprob: float
    offset: int
    top: list[tuple[bytes, float]]


def chat_logprobs(logprobs: Sequence[SpelledLogprobs]) -> dict[str, Any]:
    """`logprobs` of a chat choice, whole or of one chunk."""
    content = [
        _entry(place.spelling, place.logprob)
        | {"top_logprobs": [_entry(*token) for token in place.top]}
        for place in _places(logprobs)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(logprobs: Sequence[SpelledLogprobs]) -> dict[str, Any]:
    """`logprobs` of a completion's choice: four lists with one entry per token.

    The likeliest tokens include the sampled one. Of two tokens with the same spelling, the likelier
    one is shown.
    """
    places = list(_places(logprobs))
    return {
        "tokens": [_text(place.spelling) for place in places],
        "token_logprobs": [None if math.isnan(p.logprob) else p.logprob for p in places],
        "top_logprobs": [_top(place) for place in places],
        "text_offset": [place.offset for place in places],
    }


def echo_logprobs(logprobs: SpelledLogprobs, sent: str) -> SpelledLogprobs:
    """The logprobs of a prompt, with the offsets of its tokens in the text that was `sent`.

    That may differ from the decoded text: special tokens are left out, and a tokenizer may change a
    text. A token whose bytes are not the next in the text, such as an added one, moves no offset.
    """
    text, at, num_chars = sent.encode(errors="replace"), 0, 0
    offsets = []
    for token in logprobs.tokens.tolist():
        spelling = logprobs.spellings[token]
        if not text.startswith(spelling, at):
            spelling = spelling.removeprefix(b" ")
        inside = spelling[:1] and 0x80 <= spelling[0] < 0xC0
        offsets.append(max(0, num_chars - 1) if inside else num_chars)
        if text.startswith(spelling, at):
            at += len(spelling)
            num_chars += sum(byte & 0xC0 != 0x80 for byte in spelling)
    return replace(logprobs, offsets=np.array(offsets, np.int32))


def moved_logprobs(logprobs: Sequence[SpelledLogprobs], by: int) -> list[SpelledLogprobs]:
    """The same logprobs with all offsets moved by `by` characters."""
    return [replace(part, offsets=part.offsets + np.int32(by)) for part in logprobs]


def _places(logprobs: Sequence[SpelledLogprobs]) -> Iterator[_Place]:
    for part in logprobs:
        num_top = len(part.top_tokens) // max(1, len(part.tokens))
        spellings = [part.spellings[token] for token in part.top_tokens.tolist()]
        top = list(zip(spellings, part.top_logprobs.tolist(), strict=True))
        columns = zip(
            part.tokens.tolist(), part.logprobs.tolist(), part.offsets.tolist(), strict=True
        )
        for i, (token, logprob, offset) in enumerate(columns):
            others = top[i * num_top : (i + 1) * num_top]
            yield _Place(part.spellings[token], logprob, offset, others)


def _entry(spelling: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(spelling), "logprob": logprob, "bytes": list(spelling)}


def _top(place: _Place) -> dict[str, float] | None:
    if math.isnan(place.logprob):
        return None
    top = {_text(place.spelling): place.logprob}
    for spelling, logprob in place.top:
        text = _text(spelling)
        top[text] = max(logprob, top.get(text, logprob))
    return top


def _text(spelling: bytes) -> str:
    r"""The token as text; bytes that are not a whole character are written as \xe2."""
    return spelling.decode(errors="backslashreplace")
