"""Log-probabilities with the bytes of their tokens, and where in the text each token begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from minisrv.detokenizer.incremental import TextDecoder, TextStream
from minisrv.wire.arrays import Float32Array, Int32Array
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs, TokenLogprobs
from minisrv.wire.messages import Start


class LogprobSpeller:
    """Spells out the log-probabilities of one request's output.

    Offsets count from the start of an echoed prompt, else of the output, in the text before stop
    strings are looked for.
    """

    def __init__(self, decoder: TextDecoder, offset: int) -> None:
        """`offset` is that of the first token."""
        self._decoder, self._offset = decoder, offset
        self._expected: deque[TokenLogprobs] = deque()
        self._spelled: list[SpelledLogprobs] = []

    def expect(self, logprobs: TokenLogprobs) -> None:
        """Keep the log-probabilities of a token until its text is known."""
        self._expected.append(logprobs)

    def spell_next(self, text: str) -> None:
        """Spell the next expected token, which added `text`."""
        token = self._expected.popleft()
        offset = self._offset + _begin(self._decoder.spell(int(token.token_ids[0])), text)
        spelled = _spell(self._decoder, token, token.logprobs, token.token_ids, [offset])
        self._spelled.append(spelled)
        self._offset += len(text)

    def skip(self, text: str) -> None:
        """Pass over a token, which added `text`: its log-probabilities were sent before."""
        self._offset += len(text)

    def take_spelled(self) -> list[SpelledLogprobs]:
        """What was spelled since the last call."""
        spelled, self._spelled = self._spelled, []
        return spelled


def echo_prompt(
    start: Start, prompt_ids: Int32Array, stream: TextStream, decoder: TextDecoder
) -> PromptEcho:
    """Push a prompt into the output's stream, since it may end inside a character.

    The echo has log-probabilities if the request asked for those of its prompt. The first token
    has none.
    """
    pieces, offsets, num_chars = list[str](), list[int](), 0
    for token_id in prompt_ids.tolist():
        pieces.append(stream.push(token_id))
        offsets.append(num_chars + _begin(decoder.spell(token_id), pieces[-1]))
        num_chars += len(pieces[-1])
    pieces.append(stream.flush_whole())
    spelled, following = None, start.prompt_logprobs
    if following is not None:
        logprobs = np.concatenate([np.array([np.nan], np.float32), following.logprobs])
        spelled = _spell(decoder, following, logprobs, prompt_ids, offsets)
    return PromptEcho(uid=start.uid, text="".join(pieces), logprobs=spelled)


def _begin(spelled: bytes, text: str) -> int:
    """Where a token's own text begins in `text`, what the stream gave for it.

    `text` may start with what was held back before. The rest of a character begins where the
    character does. A token that is not shown, or not yet, begins at the end.
    """
    if spelled and 0x80 <= spelled[0] < 0xC0:
        return 0
    own = spelled.decode(errors="ignore")
    for shown in (own, own.removeprefix(" ")):
        if shown and text.endswith(shown):
            return len(text) - len(shown)
    return len(text)


def _spell(
    decoder: TextDecoder,
    tokens: TokenLogprobs,
    logprobs: Float32Array,
    token_ids: Int32Array,
    offsets: Sequence[int],
) -> SpelledLogprobs:
    """`tokens` with spellings and offsets.

    Works on columns: a prompt has thousands of tokens, each with up to twenty alternatives. Where
    there are more `logprobs` than `tokens`, the first have no alternatives.
    """
    num_top = len(tokens.top_ids) // len(tokens.token_ids) if len(tokens.token_ids) else 0
    missing = (len(logprobs) - len(tokens.logprobs)) * num_top
    top_ids = np.concatenate([np.repeat(token_ids[:1], missing), tokens.top_ids])
    top_logprobs = np.concatenate([np.full(missing, np.nan, np.float32), tokens.top_logprobs])
    ids, indices = np.unique(np.concatenate([token_ids, top_ids]), return_inverse=True)
    places: Int32Array = indices.astype(np.int32)
    return SpelledLogprobs(
        uid=tokens.uid,
        spellings=tuple(map(decoder.spell, ids.tolist())),
        tokens=places[: len(token_ids)],
        logprobs=logprobs,
        offsets=np.array(offsets, np.int32),
        top_tokens=places[len(token_ids) :],
        top_logprobs=top_logprobs,
    )
