"""Gumbel noise from a row's key and a token's id, and floats as integers of the same order."""

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
    """Two 32-bit keys and a fraction in (0, 1): what the noise of a row depends on."""
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

    Unlikely tokens win by a small u, which must be finer than the 2^-24 of a float32 near 1, or
    than 2^-32: u is (hash + fraction) * 2^-32. The hash is a bijection of the ids, so that no two
    tokens of a row share a cell, and the row's fraction places them within it. -log(1 - u) is a
    series where 1 - u would round. At the other end u is rounded to 2^-24 and stays below 1: that
    moves the probability of a token by less than 2^-24.
    """
    hashed = _mix_32(_mix_32(token.to(tl.uint32) ^ low) ^ high)
    u = (hashed.to(tl.float32) + fraction) * (2.0**-32)
    u = tl.minimum(u, 1.0 - 2.0**-24)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return -tl.log(tl.where(u < 1.0 / 64.0, series, -tl.log(1.0 - u)))


@triton.jit
def ordered_key(x):
    """float32 as int32 of the same order; zeros are equal, and a NaN is above all."""
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
    """int64, the greatest of which has the greatest key and of these the lowest token."""
    packed = (key.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    return tl.where(valid, packed, -(2**63))
