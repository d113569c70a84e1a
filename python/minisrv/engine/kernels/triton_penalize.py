"""Penalties in one kernel that reads the token counts and changes only logits of counted tokens."""

# Shapes: S samples, V vocabulary, R rows, E samples with penalties.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import PenaltyColumns

_BLOCK = 4096


# The number of samples varies from step to step; do not compile variants for some of the values.
@triton.jit(do_not_specialize=["num_samples"])
def _penalize(
    logits, counts, samples, rows, factors, num_samples, vocab_size, row_stride, BLOCK: tl.constexpr
):
    i, block = tl.program_id(0), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    times = tl.load(counts + tl.load(rows + i) * vocab_size + ids, ids < vocab_size, 0)
    occurs = times != 0
    repetition = tl.load(factors + i)
    frequency = tl.load(factors + num_samples + i)
    presence = tl.load(factors + 2 * num_samples + i)
    at = logits + tl.load(samples + i) * row_stride + ids
    given = tl.load(at, occurs, 0.0)
    x = given.to(tl.float32)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = tl.where(times > 0, x - times.to(tl.float32) * frequency - presence, x)
    tl.store(at, x.to(given.dtype), occurs)


def penalize(logits_SV: Tensor, counts_RV: Tensor, penalties: PenaltyColumns) -> None:
    """Does what Kernels.penalize_ does."""
    num_samples, vocab_size = penalties.samples_E.numel(), logits_SV.shape[1]
    _penalize[(num_samples, triton.cdiv(vocab_size, _BLOCK))](
        logits_SV,
        counts_RV,
        penalties.samples_E,
        penalties.rows_E,
        penalties.factors_3E,
        num_samples,
        vocab_size,
        logits_SV.stride(0),
        BLOCK=_BLOCK,
    )
