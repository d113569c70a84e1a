"""Makes prompts with a given number of tokens: as token ids, as text, or as a conversation.

Text is made of words that are one token each for most tokenizers, or for the given one; the
server's usage says how many tokens it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minisrv.bench.reply import Reply

_WORD_LIST = """
able about after again air all also always and another any are around ask away back bad be
because become before began best better between big black body book both boy bring but call came
can car change child city close come could country course cut day did different do door down
each early earth end enough even ever every example eye face fact far father feel few find fire
first five follow food form found four free friend from full game gave get girl give go going
gone good got great green group grow had half hand hard has have he head hear help her here high
him his hold home hour house how idea if in is it just keep kind king knew know land large last
late learn leave left let letter life light like line list little live long look made main make
man many mean men might mind money more most mother move much music must name near need never
new next night no north not now number of off often old on once one only open or order other our
out over own page paper part people place plan plant play point power problem put question quite
rain read ready real red rest right river road rock room round rule run said same saw say school
sea second see seem sent set several she ship short should show side since six size sky sleep
slow small snow so some song soon sound south stand star start state stay step still stop story
street strong such sun sure table take talk ten than that the them then there they thing think
this those three through time to today together told too took top town travel tree true try turn
two under until up us use very voice wait walk want war warm was watch water way we week well
went west were what when where which while white who whole why will wind with without word work
world would write year yes yet you young your
"""
WORDS = _WORD_LIST.split()


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt. Segments of equal keys have the same tokens as far as both go."""

    key: tuple[int, ...]
    num_tokens: int


class Prompts(Protocol):
    """Writes prompts for one form of the API. A part is what one side says in one turn."""

    def part(self, segments: Sequence[Segment], first: bool) -> str:
        """What the client says. first: whether it begins a prompt."""

    def answer(self, reply: Reply) -> str:
        """What the server said, as a part."""

    def prompt(self, parts: Sequence[str]) -> str:
        """The JSON of a prompt; client and server alternate in `parts`."""


class IdPrompts:
    """Token ids drawn from `low` to `high` - 1, for `prompt` of /v1/completions."""

    def __init__(self, low: int, high: int) -> None:
        self._ids = np.array([str(id) for id in range(low, high)], object)

    def part(self, segments: Sequence[Segment], first: bool) -> str:
        return ",".join(id for segment in segments for id in _draw(self._ids, segment))

    def answer(self, reply: Reply) -> str:
        return ",".join(map(str, reply.token_ids))

    def prompt(self, parts: Sequence[str]) -> str:
        return f"[{','.join(filter(None, parts))}]"


class TextPrompts:
    """Words, for `prompt` of /v1/completions.

    tokens_per_word: of the server's tokenizer. overhead: tokens of a prompt without words.
    """

    def __init__(
        self, words: Sequence[str] = WORDS, tokens_per_word: float = 1.0, overhead: float = 0.0
    ) -> None:
        self._words = np.array([f" {word}" for word in words], object)
        self._tokens_per_word = tokens_per_word
        self._overhead = overhead

    def part(self, segments: Sequence[Segment], first: bool) -> str:
        text, made, wanted = "", 0, -self._overhead if first else 0.0
        for segment in segments:
            wanted += segment.num_tokens
            count = round(wanted / self._tokens_per_word) - made
            if count > 0:
                text += "".join(_draw(self._words, Segment(segment.key, count)))
                made += count
        return text or str(self._words[0])

    def answer(self, reply: Reply) -> str:
        return reply.text

    def prompt(self, parts: Sequence[str]) -> str:
        return json.dumps("".join(parts))


class ChatPrompts(TextPrompts):
    """Words, for `messages` of /v1/chat/completions."""

    def prompt(self, parts: Sequence[str]) -> str:
        roles = ("user", "assistant")
        return json.dumps(
            [{"role": roles[i % 2], "content": part.strip()} for i, part in enumerate(parts)]
        )


def _draw(pool: np.ndarray[tuple[int], np.dtype[np.object_]], segment: Segment) -> list[str]:
    """`num_tokens` of the pool. Shorter segments of the same key are beginnings of longer ones."""
    rng = np.random.default_rng(segment.key)
    drawn: list[str] = pool[rng.integers(0, len(pool), segment.num_tokens)].tolist()
    return drawn
