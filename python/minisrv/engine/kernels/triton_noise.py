"""Gumbel noise as a function of row key and token id; order-preserving integer keys of floats."""

from __future__ import annotations

import triton
import triton.language as tl

NAN_KEY = tl.constexpr(0x7FFFFFFF)
INF_KEY = tl.constexpr(0x7F800000)
MINUS_INF_KEY = tl.constexpr(-0x7F800001)


@triton.jit
def _mix_64(value):
    """SplitMix64, as in sampling/uniform.py."""
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def row_keys(seed, choice, position):
    """Two 32-bit keys and a fraction in (0, 1), which determine the noise of a row."""
    state = _mix_64(seed.to(tl.uint64))
    state = _mix_64(state ^ choice.to(tl.uint64))
    state = _mix_64(state ^ position.to(tl.uint64))
    fraction = ((_mix_64(state) >> 41).to(tl.float32) + 0.5) * (2.0**-23)
    return state.to(tl.uint32), (state >> 32).to(tl.uint32), fraction


@triton.jit
def _mix_32(value):
    """The finaliser of MurmurHash3 (Appleby, 2011)."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def gumbel(token, low, high, fraction):
    """-log(-log(1 - u)), with u uniform in (0, 1).

    Unlikely tokens win by a small u, whose resolution must be finer than 2^-24 (float32 near 1) and
    2^-32: u is (hash + fraction) * 2^-32. The hash is a bijection of token ids, so no two tokens of
    a row share a cell of width 2^-32; the row's fraction is the position within the cell. Where
    1 - u would round, -log(1 - u) is computed as a series. At the other end u is rounded to 2^-24
    and kept below 1, which changes the probability of a token by less than 2^-24.
    """
    hashed = _mix_32(_mix_32(token.to(tl.uint32) ^ low) ^ high)
    u = (hashed.to(tl.float32) + fraction) * (2.0**-32)
    u = tl.minimum(u, 1.0 - 2.0**-24)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return -tl.log(tl.where(u < 1.0 / 64.0, series, -tl.log(1.0 - u)))


@triton.jit
def ordered_key(x):
    """float32 to int32, preserving order; both zeros are equal, and NaN is above everything."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x == 0.0, 0, key)
    return tl.where(x != x, NAN_KEY, key)


@triton.jit
def key_to_float(key):
    """The inverse of `ordered_key`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, token, valid):
    """int64 whose maximum has the greatest key and, among equal keys, the lowest token."""
    packed = (key.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    return tl.where(valid, packed, -(2**63))
