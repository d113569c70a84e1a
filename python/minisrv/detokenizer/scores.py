"""Log-probabilities with the bytes of their tokens, and where in the text each token begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from minisrv.detokenizer.incremental import TextDecoder, TextStream
from minisrv.messages import Int32Array, PromptEcho, ScoredToken, Start, TokenLogprobs, TokenScore


class Scorer:
    """The scores of one request's output.

    Offsets are those of the text before stop strings are looked for.
    """

    def __init__(self, decoder: TextDecoder, offset: int) -> None:
        """offset: of the first token."""
        self._decoder, self._offset = decoder, offset
        self._expected: deque[TokenLogprobs] = deque()
        self.scores: list[TokenScore] = []

    def expect(self, logprobs: TokenLogprobs) -> None:
        """The log-probabilities of a token that comes next."""
        self._expected.append(logprobs)

    def add(self, text: str) -> None:
        """The next token has come, and with it `text`."""
        logprobs = self._expected.popleft()
        spelled = self._decoder.spell(int(logprobs.token_ids[0]))
        offset = self._offset + _begin(spelled, text)
        self.scores += _scores(self._decoder, logprobs, [offset])
        self._offset += len(text)

    def take(self) -> tuple[TokenScore, ...]:
        """What has come since the last call."""
        scores, self.scores = tuple(self.scores), []
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
    scores: tuple[TokenScore, ...] = ()
    if start.prompt_logprobs is not None:
        token = decoder.spell(int(prompt_ids[0]))
        first = TokenScore(token=token, logprob=None, top=(), offset=0)
        scores = (first, *_scores(decoder, start.prompt_logprobs, offsets[1:]))
    return PromptEcho(uid=start.uid, text="".join(pieces), scores=scores)


def _begin(spelled: bytes, text: str) -> int:
    """Where in `text`, which came with a token, the token's own begins.

    What was held back before comes first. A part of a character begins where the character does;
    a token that is not shown, behind everything.
    """
    try:
        own = spelled.decode()
    except UnicodeDecodeError:
        return 0
    for shown in (own, own.removeprefix(" ")):
        if shown and text.endswith(shown):
            return len(text) - len(shown)
    return len(text)


def _scores(
    decoder: TextDecoder, logprobs: TokenLogprobs, offsets: list[int]
) -> Iterator[TokenScore]:
    num_top = len(logprobs.top_ids) // len(offsets) if offsets else 0
    top_ids, top_logprobs = logprobs.top_ids.tolist(), logprobs.top_logprobs.tolist()
    tokens = zip(logprobs.token_ids.tolist(), logprobs.logprobs.tolist(), offsets, strict=True)
    for place, (token_id, logprob, offset) in enumerate(tokens):
        span = slice(place * num_top, (place + 1) * num_top)
        yield TokenScore(
            token=decoder.spell(token_id),
            logprob=logprob,
            top=tuple(
                ScoredToken(token=decoder.spell(id), logprob=value)
                for id, value in zip(top_ids[span], top_logprobs[span], strict=True)
            ),
            offset=offset,
        )
