"""Log-probabilities of tokens, as the model gives them: before temperature, penalties and masks.

A request may want those of the tokens that it draws, those of its prompt, and the likeliest others
at each place. Steps in which nobody asks never come here.
"""

# Shapes: S samples, L samples with log-probabilities, Q prompt tokens, N of either, K likeliest.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisrv.engine.forward_batch import LogprobColumns, Logprobs
from minisrv.engine.upload import upload

# JSON has no infinities: a token that cannot come has this, as in OpenAI's replies.
FLOOR = -9999.0
# Logits of a prompt come so many tokens at a time: all of a long one would not fit in memory.
SLICE = 128


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of tokens and of the likeliest tokens in their places, best first."""

    logprobs_N: Tensor  # float32
    top_ids_NK: Tensor  # int32
    top_logprobs_NK: Tensor  # float32

    def map(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """The same with each tensor changed."""
        return Scores(
            change(self.logprobs_N), change(self.top_ids_NK), change(self.top_logprobs_NK)
        )

    def arrays(self) -> Logprobs:
        """What the scheduler gets; the tensors are in host memory."""
        return Logprobs(
            self.logprobs_N.numpy(), self.top_ids_NK.numpy(), self.top_logprobs_NK.numpy()
        )


class StepScores:
    """The scores of one step: made with the logits as they come, finished with drawn tokens."""

    def __init__(self, logits_SV: Tensor, columns: LogprobColumns) -> None:
        """Keeps what the draw will overwrite: a float32 copy of the rows that are asked for."""
        self._columns, self._device = columns, logits_SV.device
        self._samples_L = upload(columns.samples, self._device).long()
        self._all_LV = _all_logprobs(logits_SV.index_select(0, self._samples_L))
        self._parts: list[Scores] = []
        self._prompt_ids_Q = upload(columns.prompt_ids, self._device).long()
        self._num_told = 0

    def add_prompt(self, logits_NV: Tensor) -> None:
        """Logits of the next of the `prompt_tokens`, in their order."""
        first, self._num_told = self._num_told, self._num_told + logits_NV.shape[0]
        ids_N = self._prompt_ids_Q[first : self._num_told]
        self._parts.append(self._scores(_all_logprobs(logits_NV), ids_N))

    def finish(self, token_ids_S: Tensor) -> Scores:
        """All scores: those of the drawn tokens, then those of the prompts."""
        ids_L = token_ids_S.index_select(0, self._samples_L).long()
        parts = [self._scores(self._all_LV, ids_L), *self._parts]
        return Scores(
            torch.cat([part.logprobs_N for part in parts]),
            torch.cat([part.top_ids_NK for part in parts]),
            torch.cat([part.top_logprobs_NK for part in parts]),
        )

    def _scores(self, all_NV: Tensor, ids_N: Tensor) -> Scores:
        best = all_NV.topk(min(self._columns.num_top, all_NV.shape[-1]), dim=-1)
        return Scores(
            all_NV.gather(1, ids_N.unsqueeze(1)).squeeze(1), best.indices.int(), best.values
        )


def _all_logprobs(logits_NV: Tensor) -> Tensor:
    logprobs_NV = logits_NV.float().log_softmax(-1)
    return logprobs_NV.nan_to_num_(nan=FLOOR).clamp_(min=FLOOR)


def score_prompt(
    scores: StepScores | None, tokens_Q: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Give `scores` the logits of prompt tokens, a slice at a time.

    scores: None on a rank above 0, which computes its share of the logits and has no use for it.
    """
    for tokens in torch.split(tokens_Q, SLICE):
        logits = logits_of(tokens)
        if scores is not None:
            scores.add_prompt(logits)
