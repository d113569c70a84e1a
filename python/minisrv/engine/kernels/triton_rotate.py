"""Norm and rotation of queries and keys, and the write to the cache, in one Triton kernel."""

# Shapes: T tokens in the step, H query heads, K key-value heads, A = H + 2 K, D head size.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import CacheSlots, QKNormWeights, RopeRows


@triton.jit
def _norm_rotate_store(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    slots,
    keys,
    values,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    """One program per token and head. The halves are loaded separately, because each is rotated
    against the other. LIMIT: the largest number of the cache's dtype; None if no clamp is needed.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size: tl.constexpr = 2 * HALF
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    row = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * size
    first = tl.load(row + at, inside, 0.0).to(tl.float32)
    second = tl.load(row + HALF + at, inside, 0.0).to(tl.float32)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    if not is_value:
        if NORM:
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = tl.rsqrt(squares / size + eps)
            weight = q_weight if is_query else k_weight
            first *= scale * tl.load(weight + at, inside, 0.0).to(tl.float32)
            second *= scale * tl.load(weight + HALF + at, inside, 0.0).to(tl.float32)
        angles = token * size + at
        cos_1 = tl.load(cos + angles, inside, 0.0).to(tl.float32)
        cos_2 = tl.load(cos + HALF + angles, inside, 0.0).to(tl.float32)
        sin_1 = tl.load(sin + angles, inside, 0.0).to(tl.float32)
        sin_2 = tl.load(sin + HALF + angles, inside, 0.0).to(tl.float32)
        rotated_first = first * cos_1 + second * sin_1
        rotated_second = second * cos_2 + first * sin_2
        tl.store(row + at, rotated_first.to(qkv.dtype.element_ty), inside)
        tl.store(row + HALF + at, rotated_second.to(qkv.dtype.element_ty), inside)
        first, second = rotated_first, rotated_second
    if not is_query:
        slot = tl.load(slots + token)
        kv_head = head - NUM_HEADS
        cache = keys
        if is_value:
            cache = values
            kv_head -= NUM_KV_HEADS
        to = cache + (slot * NUM_KV_HEADS + kv_head) * size
        if LIMIT is not None:
            first = tl.clamp(first, -LIMIT, LIMIT)
            second = tl.clamp(second, -LIMIT, LIMIT)
        tl.store(to + at, first.to(keys.dtype.element_ty), inside)
        tl.store(to + HALF + at, second.to(keys.dtype.element_ty), inside)


def norm_rotate_store(
    qkv_TAD: Tensor,
    num_heads: int,
    norm: QKNormWeights | None,
    rope_rows: RopeRows,
    cache: CacheSlots,
) -> None:
    """See Kernels.norm_rotate_store_. All tensors are contiguous; the weights have one dtype."""
    assert qkv_TAD.is_contiguous()
    cache_dtype = cache.keys_NKD.dtype
    num_tokens, num_all_heads, head_dim = qkv_TAD.shape
    cos, sin = rope_rows
    weights = (qkv_TAD, qkv_TAD) if norm is None else (norm.q_D, norm.k_D)
    _norm_rotate_store[(num_tokens, num_all_heads)](
        qkv_TAD,
        *weights,
        cos,
        sin,
        cache.slots_T,
        cache.keys_NKD,
        cache.values_NKD,
        0.0 if norm is None else norm.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=(num_all_heads - num_heads) // 2,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        NORM=norm is not None,
        LIMIT=None if cache_dtype is qkv_TAD.dtype else torch.finfo(cache_dtype).max,
        num_warps=1,
    )
