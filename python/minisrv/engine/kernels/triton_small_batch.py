"""The products of a dense layer for at most 16 tokens, each with the work before and after it.

A decode step of few sequences reads every weight once and computes little, so its time is that of
the reads, and of the gaps between launches. Here a layer has three products before and after
attention instead of products, norms, the rotation and the activation in launches of their own:

* `project_heads`: norm, query, key and value of each head, their norms, rotation, cache write;
* `add_product_`: the output projection of attention, or of the feed-forward layer, added to the
  residual stream;
* `gate_and_up`: norm, both projections, activation;
* `add_experts_`: the whole feed-forward layer, if it is sparse (`triton_small_experts.py`).

Sums are in float32.
"""

# Shapes: T tokens, C hidden size, I inputs, O outputs, F intermediate size, H query heads, K
# key-value heads, A = H + 2 K, D head size.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import (
    CacheSlots,
    ExpertWeights,
    NormWeight,
    PlainProduct,
    QKNormWeights,
    RopeRows,
)
from minisrv.engine.kernels.triton_dependency import begin, dependent
from minisrv.engine.kernels.triton_normed_products import (
    MOST_TOKENS,
    ROWS,
    normed_products,
    precision,
)
from minisrv.engine.kernels.triton_small_experts import add_experts

# Of the three kernels: columns per program, bytes of each that a stage of the loop reads, stages.
# With these warps, half of an SM's warps have room. A small model has few more programs than there
# are SMs, so that each of them must load enough ahead.
_FEATURES, _FEATURE_BYTES, _FEATURE_STAGES, _FEATURE_WARPS = 16, 256, 5, 8
_OUTPUTS, _OUTPUT_BYTES, _OUTPUT_STAGES, _OUTPUT_WARPS = 16, 512, 4, 8
# A head's columns are one program; its halves are two blocks, as gate and up are. The bytes are
# those of half a head.
_HEAD_BYTES, _HEAD_STAGES, _HEAD_WARPS = 16 * 1024, 4, 16


@triton.jit
def _halves(row, HALF: tl.constexpr):
    """Both halves of a row in float32, to be used with every token."""
    at = row + tl.arange(0, HALF)
    return tl.load(at).to(tl.float32)[None, :], tl.load(at + HALF).to(tl.float32)[None, :]


@triton.jit
def _norm_and_rotate(first, second, weight, eps, cos, sin, token, inside, HALF: tl.constexpr):
    """Both halves of a head of each token; weight: None if there is no norm."""
    size: tl.constexpr = 2 * HALF
    if weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / size + eps)[:, None]
        weight_1, weight_2 = _halves(weight, HALF)
        first, second = first * scale * weight_1, second * scale * weight_2
    angle = token * size + tl.arange(0, HALF)[None, :]
    cos_1 = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, inside, 0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + HALF, inside, 0.0).to(tl.float32)
    return first * cos_1 + second * sin_1, second * cos_2 + first * sin_2


@triton.jit
def _store_halves(to, first, second, inside, HALF: tl.constexpr) -> None:
    kind = to.dtype.element_ty
    tl.store(to, first.to(kind), inside)
    tl.store(to + HALF, second.to(kind), inside)


# The number of tokens varies from step to step; do not compile variants for some of the values.
@triton.jit(do_not_specialize=["num_tokens"])
def _project_heads(
    x,
    norm,
    weights,
    bias,
    q_weight,
    k_weight,
    cos,
    sin,
    slots,
    qkv,
    keys,
    values,
    eps,
    head_eps,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INPUTS: tl.constexpr,
    INNER: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per head. bias, q_weight, k_weight: None if the model has none.

    LIMIT: the largest number of the cache's dtype; None if no clamp is needed.
    """
    begin(PDL)
    head, half, token = tl.program_id(0), tl.arange(0, HALF), tl.arange(0, ROWS)
    size: tl.constexpr = 2 * HALF
    all_heads: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    of_head = weights + head.to(tl.int64) * size * INPUTS
    first_at = of_head + half[None, :] * INPUTS + tl.arange(0, INNER)[:, None]
    second_at, is_token = first_at + HALF * INPUTS, token < num_tokens
    first, second, mean_squares = normed_products(
        x, norm, first_at, second_at, is_token, half < HALF, INPUTS, HALF, INNER, PRECISION
    )
    scale = tl.rsqrt(mean_squares + eps)[:, None]
    first, second = first * scale, second * scale
    if bias is not None:
        bias_1, bias_2 = _halves(bias + head * size, HALF)
        first, second = first + bias_1, second + bias_2
    inside = is_token[:, None]
    if not is_value:
        weight = None if q_weight is None else (q_weight if is_query else k_weight)
        first, second = _norm_and_rotate(
            first, second, weight, head_eps, cos, sin, token[:, None], inside, HALF
        )
    place = (token[:, None] * all_heads + head) * size + half[None, :]
    _store_halves(qkv + place, first, second, inside, HALF)
    if not is_query:
        if LIMIT is not None:
            first, second = tl.clamp(first, -LIMIT, LIMIT), tl.clamp(second, -LIMIT, LIMIT)
        number = (head - NUM_HEADS) % NUM_KV_HEADS
        slot = tl.load(slots + token, is_token, 0)[:, None]
        cached = (slot * NUM_KV_HEADS + number) * size + half[None, :]
        _store_halves((values if is_value else keys) + cached, first, second, inside, HALF)


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_and_up(
    x,
    norm,
    weights,
    bias,
    out,
    eps,
    num_tokens,
    INPUTS: tl.constexpr,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """silu(gate) * up, one program per block of features."""
    begin(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < FEATURES
    token, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    is_token = token < num_tokens
    gate_at = weights + column.to(tl.int64)[None, :] * INPUTS + inner[:, None]
    up_at = gate_at + FEATURES * INPUTS
    gate, up, mean_squares = normed_products(
        x, norm, gate_at, up_at, is_token, is_column, INPUTS, COLUMNS, INNER, PRECISION
    )
    scale = tl.rsqrt(mean_squares + eps)[:, None]
    gate, up = gate * scale, up * scale
    if bias is not None:
        gate += tl.load(bias + column, is_column, 0.0).to(tl.float32)[None, :]
        up += tl.load(bias + FEATURES + column, is_column, 0.0).to(tl.float32)[None, :]
    result = gate / (1.0 + tl.exp(-gate)) * up
    to = out + token[:, None] * FEATURES + column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), is_token[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _add_product(
    x,
    weights,
    bias,
    sums,
    num_tokens,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Adds x @ weights.T to `sums`, one program per block of outputs."""
    begin(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    is_token, is_column = (token < num_tokens)[:, None], (column < OUTPUTS)[None, :]
    a_at = x + token[:, None] * INPUTS + inner[None, :]
    b_at = weights + column.to(tl.int64)[None, :] * INPUTS + inner[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INPUTS, INNER):
        a_mask, b_mask = is_token, is_column
        if INPUTS % INNER != 0:
            is_input = inner < INPUTS - start
            a_mask, b_mask = is_token & is_input[None, :], is_input[:, None] & is_column
        a = tl.load(a_at + start, a_mask, 0.0)
        b = tl.load(b_at + start, b_mask, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + column, column < OUTPUTS, 0.0).to(tl.float32)[None, :]
    at = sums + token[:, None] * OUTPUTS + column[None, :]
    inside = is_token & is_column
    total += tl.load(at, inside, 0.0).to(tl.float32)
    tl.store(at, total.to(sums.dtype.element_ty), inside)


class TritonSmallBatch:
    """See SmallBatchKernels."""

    most_tokens = MOST_TOKENS

    def suits(self, product: PlainProduct) -> bool:
        """float16 does not: the input times the norm's weight, not yet scaled, might overflow."""
        return product.weight_OI.dtype is not torch.float16 and product.weight_OI.is_contiguous()

    def project_heads(
        self,
        x_TC: Tensor,
        norm: NormWeight,
        projection: PlainProduct,
        num_heads: int,
        qk_norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> Tensor:
        assert x_TC.is_contiguous()
        num_tokens, inputs = x_TC.shape
        num_kv_heads, head_dim = cache.keys_NKD.shape[1:]
        num_all_heads = num_heads + 2 * num_kv_heads
        cache_dtype = cache.keys_NKD.dtype
        qkv_TAD = x_TC.new_empty(num_tokens, num_all_heads, head_dim)
        half = head_dim // 2
        _project_heads[(num_all_heads,)](
            x_TC,
            norm.w_C,
            projection.weight_OI,
            projection.bias_O,
            None if qk_norm is None else qk_norm.q_D,
            None if qk_norm is None else qk_norm.k_D,
            *rope_rows,
            cache.slots_T,
            qkv_TAD,
            cache.keys_NKD,
            cache.values_NKD,
            norm.eps,
            0.0 if qk_norm is None else qk_norm.eps,
            num_tokens,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=half,
            INPUTS=inputs,
            INNER=_HEAD_BYTES // (half * x_TC.itemsize),
            LIMIT=None if cache_dtype is x_TC.dtype else torch.finfo(cache_dtype).max,
            PRECISION=precision(x_TC),
            num_warps=_HEAD_WARPS,
            num_stages=_HEAD_STAGES,
            **dependent(),
        )
        return qkv_TAD

    def gate_and_up(self, x_TC: Tensor, norm: NormWeight, projection: PlainProduct) -> Tensor:
        assert x_TC.is_contiguous()
        num_tokens, inputs = x_TC.shape
        features = projection.weight_OI.shape[0] // 2
        out_TF = x_TC.new_empty(num_tokens, features)
        _gate_and_up[(triton.cdiv(features, _FEATURES),)](
            x_TC,
            norm.w_C,
            projection.weight_OI,
            projection.bias_O,
            out_TF,
            norm.eps,
            num_tokens,
            INPUTS=inputs,
            FEATURES=features,
            COLUMNS=_FEATURES,
            INNER=_FEATURE_BYTES // x_TC.itemsize,
            PRECISION=precision(x_TC),
            num_warps=_FEATURE_WARPS,
            num_stages=_FEATURE_STAGES,
            **dependent(),
        )
        return out_TF

    def add_product_(self, x_TI: Tensor, projection: PlainProduct, sums_TO: Tensor) -> None:
        assert x_TI.is_contiguous()
        assert sums_TO.is_contiguous()
        outputs, inputs = projection.weight_OI.shape
        _add_product[(triton.cdiv(outputs, _OUTPUTS),)](
            x_TI,
            projection.weight_OI,
            projection.bias_O,
            sums_TO,
            x_TI.shape[0],
            INPUTS=inputs,
            OUTPUTS=outputs,
            COLUMNS=_OUTPUTS,
            INNER=_OUTPUT_BYTES // x_TI.itemsize,
            PRECISION=precision(x_TI),
            num_warps=_OUTPUT_WARPS,
            num_stages=_OUTPUT_STAGES,
            **dependent(),
        )

    def add_experts_(
        self,
        x_TC: Tensor,
        norm: NormWeight,
        router: PlainProduct,
        experts: ExpertWeights,
        per_token: int,
        normalize: bool,
    ) -> None:
        add_experts(x_TC, norm, router, experts, per_token, normalize)
