"""Penalties and logit biases, applied to a request's logits before sampling.

The order: repetition penalty on the raw logits, then presence and frequency penalties, then the
bias. Repetition considers prompt and output (Keskar et al., 2019, arXiv:1909.05858); presence and
frequency consider only the output, by OpenAI's formula. Token counts are kept on the device, per
row, and updated there, so that a step need not wait for the tokens of the previous step.
"""

# Shapes: S samples, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisrv.engine.forward_batch import Penalties
from minisrv.engine.transfer import upload


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one row: which tokens occur in prompt or output, and how often each was output."""

    seen_V: Tensor  # bool
    output_V: Tensor  # float32


class LogitAdjuster:
    """Keeps token counts for rows with penalties; steps without penalties do not call it."""

    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = {}

    def adjust_(self, logits_SV: Tensor, penalties: Penalties) -> None:
        """Apply penalties and biases to the logits of a step, in place, before sampling."""
        self._start_counts(penalties, logits_SV.shape[-1], logits_SV.device)
        for i, (sample, row) in enumerate(_pairs(penalties)):
            logits_V = logits_SV[sample].float()
            counts = self._counts[row]
            repetition = float(penalties.repetition[i])
            if repetition != 1:
                scaled = torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition)
                logits_V = torch.where(counts.seen_V, scaled, logits_V)
            logits_V = logits_V - float(penalties.frequency[i]) * counts.output_V
            logits_V = logits_V - float(penalties.presence[i]) * (counts.output_V > 0)
            logits_SV[sample] = logits_V.to(logits_SV.dtype)
        if penalties.bias_ids.size:
            device = logits_SV.device
            at = (
                upload(penalties.bias_samples, device).long(),
                upload(penalties.bias_ids, device).long(),
            )
            logits_SV[at] += upload(penalties.bias_values, device).to(logits_SV.dtype)

    def count_tokens(self, token_ids_S: Tensor, penalties: Penalties) -> None:
        """Add the sampled tokens to the counts, on the device."""
        for sample, row in _pairs(penalties):
            token_id = token_ids_S[sample : sample + 1].long()
            counts = self._counts[row]
            counts.seen_V.index_fill_(0, token_id, True)
            counts.output_V.index_add_(0, token_id, torch.ones_like(token_id, dtype=torch.float32))

    def _start_counts(self, penalties: Penalties, vocab_size: int, device: torch.device) -> None:
        """Count the prompt (and output so far) of rows that sample for the first time."""
        end = 0
        begun = zip(
            penalties.begin_rows.tolist(),
            penalties.begin_lens.tolist(),
            penalties.begin_prompt_lens.tolist(),
            strict=True,
        )
        for row, length, prompt_len in begun:
            ids = upload(penalties.begin_ids[end : end + length], device).long()
            end += length
            seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            output_V = torch.zeros(vocab_size, device=device)
            output = ids[prompt_len:]
            output_V.index_add_(0, output, torch.ones_like(output, dtype=torch.float32))
            self._counts[row] = _Counts(seen_V.index_fill_(0, ids, True), output_V)


def _pairs(penalties: Penalties) -> list[tuple[int, int]]:
    return list(zip(penalties.samples.tolist(), penalties.rows.tolist(), strict=True))
