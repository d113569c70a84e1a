"""Norm and rotation of queries and keys, and the write to the cache, in one Triton kernel."""

# Shapes: T tokens in the step, H query heads, K key-value heads, A = H + 2 K, D head size.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import CacheSlots, QKNormWeights, RopeRows
from minisrv.engine.kernels.triton_dependency import begin, dependent

# Heads per program. Of heads of 128 numbers a thread has one 16-byte load for each half.
_TILE, _WARPS = 8, 2


@triton.jit
def _load_halves(row, HALF: tl.constexpr, is_column):
    """Both halves of a row in float32, to be used with every head."""
    first = tl.load(row, is_column, 0.0).to(tl.float32)
    return first[None, :], tl.load(row + HALF, is_column, 0.0).to(tl.float32)[None, :]


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
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per token and tile of heads, which are all queries, all keys or all values.

    The halves are loaded separately, because each is rotated against the other. LIMIT: the largest
    number of the cache's dtype; None if no clamp is needed.
    """
    begin(PDL)
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size: tl.constexpr = 2 * HALF
    query_tiles: tl.constexpr = (NUM_HEADS + TILE - 1) // TILE
    kv_tiles: tl.constexpr = (NUM_KV_HEADS + TILE - 1) // TILE
    is_query, is_value = tile < query_tiles, tile >= query_tiles + kv_tiles
    number = tl.where(is_query, tile, (tile - query_tiles) % kv_tiles)
    num_heads = tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)
    head, at = number * TILE + tl.arange(0, TILE), tl.arange(0, BLOCK)
    is_column = at < HALF
    inside = (head < num_heads)[:, None] & is_column[None, :]
    places = head[:, None] * size + at[None, :]
    before = tl.where(is_query, 0, tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))
    row = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + before) * size + places
    first = tl.load(row, inside, 0.0).to(tl.float32)
    second = tl.load(row + HALF, inside, 0.0).to(tl.float32)
    if not is_value:
        if NORM:
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            scale = tl.rsqrt(squares / size + eps)[:, None]
            weight = q_weight if is_query else k_weight
            weight_1, weight_2 = _load_halves(weight + at, HALF, is_column)
            first, second = first * scale * weight_1, second * scale * weight_2
        angles = token * size + at
        cos_1, cos_2 = _load_halves(cos + angles, HALF, is_column)
        sin_1, sin_2 = _load_halves(sin + angles, HALF, is_column)
        first, second = first * cos_1 + second * sin_1, second * cos_2 + first * sin_2
        tl.store(row, first.to(qkv.dtype.element_ty), inside)
        tl.store(row + HALF, second.to(qkv.dtype.element_ty), inside)
    if not is_query:
        cache = values if is_value else keys
        to = cache + tl.load(slots + token) * (NUM_KV_HEADS * size) + places
        if LIMIT is not None:
            first, second = tl.clamp(first, -LIMIT, LIMIT), tl.clamp(second, -LIMIT, LIMIT)
        tl.store(to, first.to(keys.dtype.element_ty), inside)
        tl.store(to + HALF, second.to(keys.dtype.element_ty), inside)


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
    num_kv_heads = (num_all_heads - num_heads) // 2
    num_tiles = triton.cdiv(num_heads, _TILE) + 2 * triton.cdiv(num_kv_heads, _TILE)
    _norm_rotate_store[(num_tokens, num_tiles)](
        qkv_TAD,
        *weights,
        cos,
        sin,
        cache.slots_T,
        cache.keys_NKD,
        cache.values_NKD,
        0.0 if norm is None else norm.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        TILE=_TILE,
        NORM=norm is not None,
        LIMIT=None if cache_dtype is qkv_TAD.dtype else torch.finfo(cache_dtype).max,
        num_warps=_WARPS,
        **dependent(),
    )
