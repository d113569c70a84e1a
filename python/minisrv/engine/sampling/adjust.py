"""Penalties and logit biases, applied to a request's logits before sampling.

The order: repetition penalty on the raw logits, then frequency and presence penalties, then the
bias. Repetition considers prompt and output (Keskar et al., 2019, arXiv:1909.05858); frequency and
presence consider only the output, by OpenAI's formula. Token counts are kept on the device and
updated there, so that a step need not wait for the tokens of the previous step. The number of
operations in a step does not depend on how many requests have penalties.
"""

# Shapes: R rows, S samples, E samples with penalties, V vocabulary.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import Penalties
from minisrv.engine.kernels.base import Kernels, PenaltyColumns
from minisrv.engine.transfer import upload

_ONLY_IN_PROMPT = -1
_MOST = int(np.iinfo(np.int16).max)


class LogitAdjuster:
    """Keeps the token counts of all rows; steps without penalties and biases do not call it.

    The counts are one int16 tensor, so a token counts as output at most 32,767 times. Only the rows
    of a step are read or written. Where the kernels of a device apply penalties as they sample, it
    only begins the counts.
    """

    def __init__(
        self, kernels: Kernels, num_rows: int, vocab_size: int, device: torch.device
    ) -> None:
        self._kernels, self._device = kernels, device
        shape = (num_rows, vocab_size)
        if device.type == "cpu":
            # Unlike torch's zeros, these take no memory until a row is used.
            self.counts_RV = torch.from_numpy(np.zeros(shape, np.int16))
        else:
            self.counts_RV = torch.zeros(shape, dtype=torch.int16, device=device)

    @property
    def num_bytes(self) -> int:
        return self.counts_RV.nbytes

    def begin(self, penalties: Penalties) -> None:
        """Count the prompt (and output so far) of rows that sample for the first time.

        Forgets what these rows counted for earlier requests.
        """
        if not penalties.begin_rows.size:
            return
        vocab_size = self.counts_RV.shape[1]
        lens = penalties.begin_lens
        offsets = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        is_output = offsets >= np.repeat(penalties.begin_prompt_lens, lens)
        keys = np.repeat(penalties.begin_rows.astype(np.int64) * vocab_size, lens)
        places, indices = np.unique(keys + penalties.begin_ids, return_inverse=True)
        times = np.bincount(indices[is_output], minlength=places.size).clip(max=_MOST)
        times[times == 0] = _ONLY_IN_PROMPT
        self.counts_RV.index_fill_(0, self._indices(penalties.begin_rows), 0)
        values = upload(times.astype(np.int16), self._device)
        self.counts_RV.view(-1).index_copy_(0, self._indices(places), values)

    def adjust_(self, logits_SV: Tensor, penalties: Penalties) -> None:
        """Apply penalties and biases to the float32 logits of a step, in place, before sampling."""
        self.begin(penalties)
        if penalties.samples.size:
            factors = (penalties.repetition, penalties.frequency, penalties.presence)
            columns = PenaltyColumns(
                self._indices(penalties.samples),
                self._indices(penalties.rows),
                upload(np.stack(factors), self._device),
            )
            self._kernels.penalize_(logits_SV, self.counts_RV, columns)
        if penalties.bias_ids.size:
            at = self._indices(penalties.bias_samples), self._indices(penalties.bias_ids)
            values = upload(penalties.bias_values, self._device)
            logits_SV.index_put_(at, values, accumulate=True)

    def count_tokens(self, token_ids_S: Tensor, penalties: Penalties) -> None:
        """Add the sampled tokens to the counts, on the device."""
        if not penalties.samples.size:
            return
        ids_E = token_ids_S.index_select(0, self._indices(penalties.samples)).long()
        at = self._indices(penalties.rows), ids_E
        times_E = self.counts_RV[at].clamp_(0, _MOST - 1).add_(1)
        self.counts_RV.index_put_(at, times_E)

    def _indices(self, array: np.ndarray) -> Tensor:
        return upload(array.astype(np.int64), self._device)
