"""The router of a sparse layer in one launch: softmax, the best experts, and their scores."""

# Shapes: T tokens, E experts, N experts per token.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.triton_dependency import begin, dependent
from minisrv.engine.kernels.triton_noise import key_to_float, ordered_key, pack


@triton.jit
def _route(
    logits,
    scores,
    experts,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    CHOSEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per token. Of equal experts the first is taken first."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    every, place = tl.arange(0, EXPERTS), tl.arange(0, CHOSEN)
    there = every < NUM_EXPERTS
    x = tl.load(logits + token * NUM_EXPERTS + every, there, float("-inf")).to(tl.float32)
    weight = tl.exp(x - tl.max(x, 0))
    left = pack(ordered_key(weight / tl.sum(weight, 0)), every, there)
    probs = tl.zeros([CHOSEN], tl.float32)
    chosen = tl.zeros([CHOSEN], tl.int64)
    for i in tl.static_range(PER_TOKEN):
        best = tl.max(left, 0)
        expert = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        probs = tl.where(place == i, key_to_float((best >> 32).to(tl.int32)), probs)
        chosen = tl.where(place == i, expert, chosen)
        left = tl.where(every == expert, -(2**63), left)
    if NORMALIZE:
        probs = probs / tl.sum(probs, 0)
    to = token * PER_TOKEN + place
    tl.store(scores + to, probs.to(scores.dtype.element_ty), place < PER_TOKEN)
    tl.store(experts + to, chosen, place < PER_TOKEN)


def route(logits_TE: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See Kernels.route."""
    assert logits_TE.is_contiguous()
    num_tokens, num_experts = logits_TE.shape
    scores_TN = logits_TE.new_empty(num_tokens, per_token)
    experts_TN = torch.empty_like(scores_TN, dtype=torch.int64)
    if num_tokens:
        _route[(num_tokens,)](
            logits_TE,
            scores_TN,
            experts_TN,
            NUM_EXPERTS=num_experts,
            EXPERTS=triton.next_power_of_2(num_experts),
            PER_TOKEN=per_token,
            CHOSEN=triton.next_power_of_2(per_token),
            NORMALIZE=normalize,
            num_warps=1,
            **dependent(),
        )
    return scores_TN, experts_TN
