"""A sparse layer for at most 16 tokens, in four launches: norm and router, the choice of experts,
gate and up, down.

Each expert has its tokens in one tile of 16 rows, in which a token's row is its own number, so
nothing has to be sorted. Rows of tokens that did not choose the expert are neither read nor
written. The outputs of a token's experts are added up in the order of the experts, in float32 and
together with the residual stream, so a token does not depend on the others.
"""

# Shapes: T tokens, C hidden size, E experts, N experts per token, F features of an expert, G = 2 F,
# W tiles.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import ExpertWeights, NormWeight, PlainProduct
from minisrv.engine.kernels.triton_dependency import begin, dependent
from minisrv.engine.kernels.triton_noise import ordered_key, pack
from minisrv.engine.kernels.triton_normed_products import (
    MOST_TOKENS,
    ROWS,
    normed_products,
    precision,
)

# Of the three products: columns per program, of one of two blocks where there are two; bytes of
# each that a stage of the loop reads; stages; warps.
_ROUTER_COLUMNS, _ROUTER_BYTES, _ROUTER_STAGES, _ROUTER_WARPS = 8, 512, 5, 4
_CHOOSE_WARPS = 4
_FEATURES, _FEATURE_BYTES, _FEATURE_STAGES, _FEATURE_WARPS = 16, 256, 5, 8
# There is only one program per SM, so that it must load enough ahead. Half of the stages are for
# the tiles' words, on which the other loads depend.
_OUTPUTS, _OUTPUT_BYTES, _OUTPUT_STAGES, _OUTPUT_WARPS = 16, 512, 13, 16


# The number of tokens varies from step to step; do not compile variants for some of the values.
@triton.jit(do_not_specialize=["num_tokens"])
def _multiply_router(
    x,
    norm,
    weights,
    logits,
    eps,
    num_tokens,
    INPUTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """float32 logits of the normed tokens; one program per block of experts of each half."""
    begin(PDL)
    half: tl.constexpr = (NUM_EXPERTS + 1) // 2
    first_expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = first_expert < half
    # With an odd number of experts the last one of the second half is read twice, and stored once.
    second_expert = tl.minimum(first_expert + half, NUM_EXPERTS - 1)
    token, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    first_at = weights + first_expert[None, :] * INPUTS + inner[:, None]
    second_at = weights + second_expert[None, :] * INPUTS + inner[:, None]
    is_row = token < num_tokens
    first, second, mean_squares = normed_products(
        x, norm, first_at, second_at, is_row, is_column, INPUTS, COLUMNS, INNER, PRECISION
    )
    scale = tl.rsqrt(mean_squares + eps)[:, None]
    to = logits + token[:, None] * NUM_EXPERTS + first_expert[None, :]
    tl.store(to, first * scale, is_row[:, None] & is_column[None, :])
    is_second = is_column & (first_expert + half < NUM_EXPERTS)
    tl.store(to + half, second * scale, is_row[:, None] & is_second[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_experts(
    logits,
    scores,
    tiles,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The scores of each token's best experts, and the tiles; in a single program.

    scores: [T, E]; only those of chosen experts are written. tiles: first their number, then for
    each its expert times 65536, plus a bit for each of its tokens. Of equal experts the first is
    taken first.
    """
    begin(PDL)
    token, expert = tl.arange(0, ROWS)[:, None], tl.arange(0, EXPERTS)
    every = expert[None, :]
    inside = (token < num_tokens) & (every < NUM_EXPERTS)
    at = token * NUM_EXPERTS + every
    x = tl.where(every < NUM_EXPERTS, tl.load(logits + at, inside, 0.0), float("-inf"))
    weight = tl.exp(x - tl.max(x, 1)[:, None])
    probs = weight / tl.sum(weight, 1)[:, None]
    left = pack(ordered_key(probs), every, every < NUM_EXPERTS)
    chosen = every < 0
    for _ in tl.static_range(PER_TOKEN):
        best = left == tl.max(left, 1)[:, None]
        chosen = chosen | best
        left = tl.where(best, -(2**63), left)
    probs = tl.where(chosen, probs, 0.0)
    if NORMALIZE:
        probs = probs / tl.sum(probs, 1)[:, None]
    chosen = chosen & inside
    tl.store(scores + at, probs, chosen)
    tokens = tl.sum(tl.where(chosen, 1 << token, 0), 0)
    is_used = (tokens != 0).to(tl.int32)
    tile = tl.cumsum(is_used, 0) - is_used
    tl.store(tiles, tl.sum(is_used, 0))
    tl.store(tiles + 1 + tile, expert * 65536 + tokens, tokens != 0)


@triton.jit
def _expert_and_rows(tiles, tile):
    """Of a tile."""
    word = tl.load(tiles + 1 + tile)
    return (word >> 16).to(tl.int64), (word >> tl.arange(0, ROWS)) & 1 != 0


@triton.jit
def _gate_and_up_of_experts(
    x,
    norm,
    weights,
    tiles,
    scores,
    hidden,
    eps,
    NUM_EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """silu(gate) * up times the score, one program per tile and block of features."""
    begin(PDL)
    tile = tl.program_id(0)
    if tile < tl.load(tiles):
        expert, is_row = _expert_and_rows(tiles, tile)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < FEATURES
        token, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
        of_expert = weights + expert * (2 * FEATURES * INPUTS)
        gate_at = of_expert + column[None, :] * INPUTS + inner[:, None]
        up_at = gate_at + FEATURES * INPUTS
        gate, up, mean_squares = normed_products(
            x, norm, gate_at, up_at, is_row, is_column, INPUTS, COLUMNS, INNER, PRECISION
        )
        scale = tl.rsqrt(mean_squares + eps)[:, None]
        gate, up = gate * scale, up * scale
        score = tl.load(scores + token * NUM_EXPERTS + expert, is_row, 0.0)
        result = gate / (1.0 + tl.exp(-gate)) * up * score[:, None]
        to = hidden + (tile * ROWS + token)[:, None] * FEATURES + column[None, :]
        inside = is_row[:, None] & is_column[None, :]
        tl.store(to, result.to(hidden.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_experts(
    hidden,
    weights,
    tiles,
    sums,
    num_tokens,
    FEATURES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Adds the products of all tiles to `sums`, one program per block of outputs.

    A single loop over the blocks of all tiles, so that loads run ahead into the next tile.
    """
    begin(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    is_column = (column < OUTPUTS)[None, :]
    of_token = hidden + token[:, None] * FEATURES + inner[None, :]
    of_column = weights + column[None, :] * FEATURES + inner[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    per_tile: tl.constexpr = (FEATURES + INNER - 1) // INNER
    for i in range(0, tl.load(tiles) * per_tile):
        tile, start = i // per_tile, i % per_tile * INNER
        expert, is_row = _expert_and_rows(tiles, tile)
        a_mask, b_mask = is_row[:, None], is_column
        if FEATURES % INNER != 0:
            is_input = inner < FEATURES - start
            a_mask, b_mask = a_mask & is_input[None, :], is_input[:, None] & is_column
        a = tl.load(of_token + tile * (ROWS * FEATURES) + start, a_mask, 0.0)
        b = tl.load(of_column + expert * (OUTPUTS * FEATURES) + start, b_mask, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = sums + token[:, None] * OUTPUTS + column[None, :]
    inside = (token < num_tokens)[:, None] & is_column
    total += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(at, total.to(sums.dtype.element_ty), inside)


def _choose(
    x_TC: Tensor, norm: NormWeight, router: PlainProduct, per_token: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The scores and tiles of `_choose_experts`."""
    assert router.bias_O is None
    num_tokens, hidden_size = x_TC.shape
    num_experts = router.weight_OI.shape[0]
    logits_TE, scores_TE = torch.empty(
        2, num_tokens, num_experts, dtype=torch.float32, device=x_TC.device
    )
    tiles_W = torch.empty(
        1 + min(num_tokens * per_token, num_experts), dtype=torch.int32, device=x_TC.device
    )
    _multiply_router[(triton.cdiv(triton.cdiv(num_experts, 2), _ROUTER_COLUMNS),)](
        x_TC,
        norm.w_C,
        router.weight_OI,
        logits_TE,
        norm.eps,
        num_tokens,
        INPUTS=hidden_size,
        NUM_EXPERTS=num_experts,
        COLUMNS=_ROUTER_COLUMNS,
        INNER=_ROUTER_BYTES // x_TC.itemsize,
        PRECISION=precision(x_TC),
        num_warps=_ROUTER_WARPS,
        num_stages=_ROUTER_STAGES,
        **dependent(),
    )
    _choose_experts[(1,)](
        logits_TE,
        scores_TE,
        tiles_W,
        num_tokens,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        PER_TOKEN=per_token,
        NORMALIZE=normalize,
        num_warps=_CHOOSE_WARPS,
        **dependent(),
    )
    return scores_TE, tiles_W


def add_experts(
    x_TC: Tensor,
    norm: NormWeight,
    router: PlainProduct,
    experts: ExpertWeights,
    per_token: int,
    normalize: bool,
) -> None:
    """See SmallBatchKernels.add_experts_."""
    assert x_TC.is_contiguous()
    num_tokens, hidden_size = x_TC.shape
    num_experts, _, features = experts.down_ECF.shape
    scores_TE, tiles_W = _choose(x_TC, norm, router, per_token, normalize)
    most = tiles_W.numel() - 1
    hidden = x_TC.new_empty(most, MOST_TOKENS, features)
    _gate_and_up_of_experts[(most, triton.cdiv(features, _FEATURES))](
        x_TC,
        norm.w_C,
        experts.gate_up_EGC,
        tiles_W,
        scores_TE,
        hidden,
        norm.eps,
        NUM_EXPERTS=num_experts,
        INPUTS=hidden_size,
        FEATURES=features,
        COLUMNS=_FEATURES,
        INNER=_FEATURE_BYTES // x_TC.itemsize,
        PRECISION=precision(x_TC),
        num_warps=_FEATURE_WARPS,
        num_stages=_FEATURE_STAGES,
        **dependent(),
    )
    _add_experts[(triton.cdiv(hidden_size, _OUTPUTS),)](
        hidden,
        experts.down_ECF,
        tiles_W,
        x_TC,
        num_tokens,
        FEATURES=features,
        OUTPUTS=hidden_size,
        COLUMNS=_OUTPUTS,
        INNER=_OUTPUT_BYTES // x_TC.itemsize,
        PRECISION=precision(x_TC),
        num_warps=_OUTPUT_WARPS,
        num_stages=_OUTPUT_STAGES,
        **dependent(),
    )
