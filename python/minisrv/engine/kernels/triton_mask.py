"""The masks of grammars in one kernel, without temporaries of the size of the vocabulary."""

# Shapes: S samples, V vocabulary, G samples with a grammar, W words of a mask.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.triton_dependency import begin, dependent

_BLOCK = 1024


@triton.jit
def _mask(
    logits,
    samples,
    masks,
    vocab_size,
    row_stride,
    num_words,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per mask and block of the vocabulary."""
    begin(PDL)
    i = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab_size
    words = tl.load(masks + i * num_words + ids // 32, inside, -1)
    refused = (words >> (ids % 32)) & 1 == 0
    row = tl.load(samples + i).to(tl.int64)
    tl.store(logits + row * row_stride + ids, float("-inf"), inside & refused)


def mask_logits(logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
    """Does what Kernels.mask_logits_ does."""
    assert masks_GW.is_contiguous()
    num_masks, num_words = masks_GW.shape
    vocab_size = logits_SV.shape[1]
    _mask[(num_masks, triton.cdiv(vocab_size, _BLOCK))](
        logits_SV,
        samples_G,
        masks_GW,
        vocab_size,
        logits_SV.stride(0),
        num_words,
        BLOCK=_BLOCK,
        **dependent(),
    )
