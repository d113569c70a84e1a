"""A played model whose steps, and what its readers find of them, are cut anew for each request."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np

from minisrv.wire.codec import decode, encode
from minisrv.wire.logprobs import TokenLogprobs
from minisrv.wire.messages import (
    DETOKENIZER_INBOX,
    FRONTEND_INBOX,
    DetokenizeMsg,
    Finish,
    GenerateMsg,
)
from tests.support.played_model import ADDED, EOS, SPECIAL, PlayedModel, played_logprobs

MARKS = [*SPECIAL, *ADDED]


class CutModel(PlayedModel):
    """Says `segments` to every choice. A mark is one token, or with `cuts_marks` never one.

    token_seed decides how the text becomes tokens. step_seed decides which choices are in a step,
    how many steps a reader misses, and how long tokens follow a stop string.
    """

    segments: Sequence[str] = ()
    cuts_marks = False
    token_seed = 0
    step_seed = 0

    def say(self, segments: Sequence[str], token_seed: int) -> None:
        """What to answer from now on; every other seed cuts marks."""
        self.segments, self.token_seed = segments, token_seed
        self.cuts_marks = token_seed % 2 == 1

    def tokens(self, choice: int) -> list[int]:
        """The text of a choice, encoded in pieces."""
        rng = random.Random(f"{self.token_seed} {choice}")
        ids: list[int] = []
        for segment in self.segments:
            for piece in self._pieces(segment, rng):
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return [*ids, EOS]

    def _pieces(self, segment: str, rng: random.Random) -> list[str]:
        if segment not in MARKS:
            return _cut(segment, rng)
        at = rng.randrange(1, len(segment)) if self.cuts_marks else len(segment)
        return [segment[:at], segment[at:]]

    async def _generate(self, uid: int, message: GenerateMsg) -> None:
        if uid == message.uid:
            await _Steps(self, message).run()


class _Steps:
    """One request from its first step to the final of its last choice."""

    def __init__(self, model: CutModel, message: GenerateMsg) -> None:
        self._model, self._message = model, message
        self._rng = random.Random(f"{model.step_seed}")
        uids = range(message.uid, message.uid + message.sampling.n)
        self._left = {uid: model.tokens(uid - message.uid) for uid in uids}
        if limit := message.sampling.max_tokens:
            self._left = {uid: ids[:limit] for uid, ids in self._left.items()}
        self._unstarted = set(uids)
        self._stopping: dict[int, int] = {}

    async def run(self) -> None:
        while self._left:
            share = self._rng.choice([0.2, 0.6, 1.0])
            uids = [uid for uid in self._left if self._rng.random() < share]
            if uids:
                self._rng.shuffle(uids)
                self._step(uids)
            for _ in range(self._rng.choice([0, 0, 1, 3])):
                await asyncio.sleep(0)

    def _step(self, uids: Sequence[int]) -> None:
        entries = [self._entry(uid) for uid in uids]
        message, model = self._message, self._model
        starts = tuple(model._start(uid, message) for uid in uids if uid in self._unstarted)
        self._unstarted.difference_update(uids)
        step = DetokenizeMsg(
            uids=np.array(uids, np.int64),
            token_ids=np.array([token for token, _ in entries], np.int32),
            finishes=np.array([finish for _, finish in entries], np.uint8),
            starts=starts,
            logprobs=self._logprobs(uids, entries),
        )
        reply, abort = model._detokenizer.handle(decode(encode(step), DETOKENIZER_INBOX))  # type: ignore[arg-type]
        if abort is not None:
            self._stopping.update(dict.fromkeys(abort.uids, self._rng.randint(0, 2)))
        if reply is not None:
            model._registry.deliver(decode(encode(reply), FRONTEND_INBOX))  # type: ignore[arg-type]

    def _logprobs(
        self, uids: Sequence[int], entries: Sequence[tuple[int, Finish]]
    ) -> tuple[TokenLogprobs, ...]:
        num_top = self._message.sampling.logprobs
        told = [(uid, token) for uid, (token, _) in zip(uids, entries, strict=True) if token >= 0]
        if num_top is None:
            return ()
        return tuple(played_logprobs(uid, [token], num_top) for uid, token in told)

    def _entry(self, uid: int) -> tuple[int, Finish]:
        ids = self._left[uid]
        late = self._stopping.get(uid)
        if late == 0:
            del self._left[uid]
            return -1, Finish.ABORT
        if late is not None:
            self._stopping[uid] = late - 1
        token = ids.pop(0)
        if not ids:
            del self._left[uid]
        return token, Finish.NONE if ids else Finish.STOP if token == EOS else Finish.LENGTH


def _cut(text: str, rng: random.Random) -> list[str]:
    """`text` in pieces of one or more characters."""
    borders = [i for i in range(1, len(text)) if rng.random() < 0.3]
    return [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
