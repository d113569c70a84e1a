"""Logprobs of tokens as the model assigns them: before temperature, penalties and masks.

A request may ask for those of its sampled tokens, those of its prompt, and the most likely
alternatives at each position. Steps in which no request asks for any do not run this code.
"""

# Shapes: S samples, V vocabulary, L samples with logprobs, Q prompt tokens, N tokens of either
# kind, K alternatives.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisrv.engine.forward_batch import LogprobColumns, Logprobs
from minisrv.engine.transfer import upload

# JSON has no infinities: an impossible token gets this value, as in OpenAI's replies.
FLOOR = -9999.0
# Prompt tokens whose logits are computed at once: those of a long prompt would not fit in memory.
SLICE = 128


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Logprobs of tokens and of the most likely alternatives at their positions, best first."""

    logprobs_N: Tensor  # float32
    top_ids_NK: Tensor  # int32
    top_logprobs_NK: Tensor  # float32

    def map(self, change: Callable[[Tensor], Tensor]) -> LogprobTensors:
        """A copy with `change` applied to each tensor."""
        return LogprobTensors(
            change(self.logprobs_N), change(self.top_ids_NK), change(self.top_logprobs_NK)
        )

    def to_numpy(self) -> Logprobs:
        """The tensors must be in host memory."""
        return Logprobs(
            self.logprobs_N.numpy(), self.top_ids_NK.numpy(), self.top_logprobs_NK.numpy()
        )


class StepLogprobs:
    """The logprobs of one step: created before sampling, finished with the sampled tokens."""

    def __init__(self, logits_SV: Tensor, columns: LogprobColumns) -> None:
        """Keeps a float32 copy of the requested rows, because sampling overwrites the logits."""
        self._columns, self._device = columns, logits_SV.device
        self._samples_L = upload(columns.samples, self._device).long()
        self._all_LV = _all_logprobs(logits_SV.index_select(0, self._samples_L))
        self._parts: list[LogprobTensors] = []
        self._prompt_ids_Q = upload(columns.prompt_ids, self._device).long()
        self._num_added = 0

    def add_prompt_logits(self, logits_NV: Tensor) -> None:
        """Add the logits of the next N prompt tokens, in the order of `prompt_logprob_tokens`."""
        first, self._num_added = self._num_added, self._num_added + logits_NV.shape[0]
        ids_N = self._prompt_ids_Q[first : self._num_added]
        self._parts.append(self._select(_all_logprobs(logits_NV), ids_N))

    def finish(self, token_ids_S: Tensor) -> LogprobTensors:
        """Those of the sampled tokens, then those of the prompts."""
        ids_L = token_ids_S.index_select(0, self._samples_L).long()
        parts = [self._select(self._all_LV, ids_L), *self._parts]
        return LogprobTensors(
            torch.cat([part.logprobs_N for part in parts]),
            torch.cat([part.top_ids_NK for part in parts]),
            torch.cat([part.top_logprobs_NK for part in parts]),
        )

    def _select(self, all_NV: Tensor, ids_N: Tensor) -> LogprobTensors:
        best = all_NV.topk(min(self._columns.num_top, all_NV.shape[-1]), dim=-1)
        return LogprobTensors(
            all_NV.gather(1, ids_N.unsqueeze(1)).squeeze(1), best.indices.int(), best.values
        )


def _all_logprobs(logits_NV: Tensor) -> Tensor:
    logprobs_NV = logits_NV.float().log_softmax(-1)
    return logprobs_NV.nan_to_num_(nan=FLOOR).clamp_(min=FLOOR)


def add_prompt_in_slices(
    logprobs: StepLogprobs | None, tokens_Q: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Compute the logits of prompt tokens, a slice at a time, and add them to `logprobs`.

    logprobs: None on ranks above 0, which must still compute their shard of the logits.
    """
    for tokens in torch.split(tokens_Q, SLICE):
        logits = logits_of(tokens)
        if logprobs is not None:
            logprobs.add_prompt_logits(logits)
