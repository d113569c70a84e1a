"""Log-probabilities with the bytes of their tokens, and where in the text each token begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from minisrv.detokenizer.incremental import TextDecoder, TextStream
from minisrv.wire.arrays import Float32Array, Int32Array
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs, TokenLogprobs
from minisrv.wire.messages import Start


class Scorer:
    """The scores of one request's output.

    Offsets count from the start of an echoed prompt, else of the output, in the text before stop
    strings are looked for.
    """

    def __init__(self, decoder: TextDecoder, offset: int) -> None:
        """offset: of the first token."""
        self._decoder, self._offset = decoder, offset
        self._expected: deque[TokenLogprobs] = deque()
        self.logprobs: list[SpelledLogprobs] = []

    def expect(self, logprobs: TokenLogprobs) -> None:
        """The log-probabilities of a token that comes next."""
        self._expected.append(logprobs)

    def add(self, text: str) -> None:
        """The next token has come, and with it `text`."""
        told = self._expected.popleft()
        offset = self._offset + _begin(self._decoder.spell(int(told.token_ids[0])), text)
        self.logprobs.append(_scores(self._decoder, told, told.logprobs, told.token_ids, [offset]))
        self._offset += len(text)

    def take(self) -> tuple[SpelledLogprobs, ...]:
        """What has come since the last call."""
        scores, self.logprobs = tuple(self.logprobs), []
        return scores


def echo_prompt(
    start: Start, prompt_ids: Int32Array, stream: TextStream, decoder: TextDecoder
) -> PromptEcho:
    """The text of a prompt, which goes into the output's stream first: it may end in a character.

    With scores if the request has log-probabilities of its prompt; the first token has none.
    """
    pieces, offsets, num_chars = list[str](), list[int](), 0
    for token_id in prompt_ids.tolist():
        pieces.append(stream.push(token_id))
        offsets.append(num_chars + _begin(decoder.spell(token_id), pieces[-1]))
        num_chars += len(pieces[-1])
    pieces.append(stream.flush_whole())
    scores, told = None, start.prompt_logprobs
    if told is not None:
        logprobs = np.concatenate([np.array([np.nan], np.float32), told.logprobs])
        scores = _scores(decoder, told, logprobs, prompt_ids, offsets)
    return PromptEcho(uid=start.uid, text="".join(pieces), logprobs=scores)


def _begin(spelled: bytes, text: str) -> int:
    """Where in `text`, which came with a token, the token's own begins.

    What was held back before comes first. The rest of a character begins where the character does;
    a token that is not shown, or not yet, behind everything.
    """
    if spelled and 0x80 <= spelled[0] < 0xC0:
        return 0
    own = spelled.decode(errors="ignore")
    for shown in (own, own.removeprefix(" ")):
        if shown and text.endswith(shown):
            return len(text) - len(shown)
    return len(text)


def _scores(
    decoder: TextDecoder,
    told: TokenLogprobs,
    logprobs: Float32Array,
    token_ids: Int32Array,
    offsets: Sequence[int],
) -> SpelledLogprobs:
    """As columns: a prompt has thousands of tokens, and each may have twenty others beside it.

    Where `logprobs` are more than those told, the first have no others.
    """
    num_top = len(told.top_ids) // len(told.token_ids) if len(told.token_ids) else 0
    missing = (len(logprobs) - len(told.logprobs)) * num_top
    top_ids = np.concatenate([np.repeat(token_ids[:1], missing), told.top_ids])
    top_logprobs = np.concatenate([np.full(missing, np.nan, np.float32), told.top_logprobs])
    ids, indices = np.unique(np.concatenate([token_ids, top_ids]), return_inverse=True)
    places: Int32Array = indices.astype(np.int32)
    return SpelledLogprobs(
        spellings=tuple(map(decoder.spell, ids.tolist())),
        tokens=places[: len(token_ids)],
        logprobs=logprobs,
        offsets=np.array(offsets, np.int32),
        top_tokens=places[len(token_ids) :],
        top_logprobs=top_logprobs,
    )
