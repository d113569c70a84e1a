"""Penalties in one kernel that reads the token counts and changes only logits of counted tokens."""

# Shapes: S samples, V vocabulary, R rows, E samples with penalties.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.kernels.triton_dependency import begin, dependent

# 8 counts per thread, one 16-byte load.
_BLOCK, _WARPS = 4096, 16
_MOST = tl.constexpr(2**15 - 1)


@triton.jit
def load_penalties(factors, stride, i):
    """Repetition, frequency and presence penalty, and whether any of them changes a logit."""
    repetition = tl.load(factors + i)
    frequency, presence = tl.load(factors + stride + i), tl.load(factors + 2 * stride + i)
    changes = (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)
    return repetition, frequency, presence, changes


@triton.jit
def count_token(counts, rows, factors, stride, i, token, vocab_size) -> None:
    """Add the token of sample i to the counts of its row, if it has penalties.

    A count stops at the most that it can hold.
    """
    _, _, _, changes = load_penalties(factors, stride, i)
    if changes:
        at = counts + tl.load(rows + i).to(tl.int64) * vocab_size + token
        times = tl.maximum(tl.load(at).to(tl.int32), 0) + 1
        tl.store(at, tl.minimum(times, _MOST).to(tl.int16))


# The stride may be the number of samples; do not compile variants for some of the values.
@triton.jit(do_not_specialize=["factor_stride"])
def _penalize(
    logits,
    counts,
    samples,
    rows,
    factors,
    factor_stride,
    vocab_size,
    row_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per sample and block; those of samples without penalties exit at once."""
    begin(PDL)
    i, block = tl.program_id(0), tl.program_id(1)
    repetition, frequency, presence, changes = load_penalties(factors, factor_stride, i)
    if changes:
        ids = block * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(rows + i).to(tl.int64)
        times = tl.load(counts + row * vocab_size + ids, ids < vocab_size, 0)
        occurs = times != 0
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
        penalties.factors_3E.stride(0),
        vocab_size,
        logits_SV.stride(0),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        **dependent(),
    )
