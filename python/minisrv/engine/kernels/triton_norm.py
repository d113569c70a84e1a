"""The norm behind a sparse layer, which also adds up the outputs of each token's experts."""

# Shapes: T tokens, N parts, C hidden size.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.triton_dependency import begin, dependent


@triton.jit
def _add_parts_and_norm(
    x,
    parts,
    weight,
    out,
    eps,
    NUM_PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per token. Sums are in float32, the parts in their order."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    of_token = parts + token * (NUM_PARTS * SIZE) + at
    delta = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(NUM_PARTS):
        delta += tl.load(of_token + i * SIZE, inside, 0.0).to(tl.float32)
    row = token * SIZE + at
    total = tl.load(x + row, inside, 0.0).to(tl.float32) + delta
    tl.store(x + row, total.to(x.dtype.element_ty), inside)
    scale = tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps)
    normed = total * scale * tl.load(weight + at, inside, 0.0).to(tl.float32)
    tl.store(out + row, normed.to(out.dtype.element_ty), inside)


def add_parts_and_norm(x_TC: Tensor, parts_TNC: Tensor, w_C: Tensor, eps: float) -> Tensor:
    """See Kernels.add_rms_norm_, whose delta this is."""
    assert x_TC.is_contiguous()
    assert parts_TNC.is_contiguous()
    num_tokens, num_parts, size = parts_TNC.shape
    out_TC = torch.empty_like(x_TC)
    block = triton.next_power_of_2(size)
    if num_tokens:
        _add_parts_and_norm[(num_tokens,)](
            x_TC,
            parts_TNC,
            w_C,
            out_TC,
            eps,
            NUM_PARTS=num_parts,
            SIZE=size,
            BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
            **dependent(),
        )
    return out_TC
