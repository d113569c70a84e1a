"""Top-k, top-p and min-p of one row by search, without a sort: a few passes over the candidates.

Top-k and top-p each keep all tokens above some logit, and the first few of those equal to it. That
logit is found by search over the ordered integers of its dtype (`ordered_key`): each pass counts
the tokens, and sums their weights, at and above three pivots, and continues between two of them.
The first pivots are a few temperatures below the best logit, where the answer usually is. Blocks
whose best logit is below the lowest pivot are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minisrv.engine.kernels.triton_noise import (
    MINUS_INF_KEY,
    gumbel,
    key_to_float,
    ordered_key,
    pack,
)

_ALL = tl.constexpr(2**30)


@triton.jit
def _weigh(row, key_1, key_2, key_3, BLOCK: tl.constexpr, SPARE_BITS: tl.constexpr):
    """Count and weight of the tokens at and above each of three ascending keys."""
    logits, best, vocab_size, num_blocks, top, scale = row
    count_1 = tl.zeros([BLOCK], tl.int32)
    count_2, count_3 = count_1, count_1
    mass_1 = tl.zeros([BLOCK], tl.float32)
    mass_2, mass_3 = mass_1, mass_1
    for block in range(num_blocks):
        block_key = (tl.load(best + block) >> (32 + SPARE_BITS)).to(tl.int32)
        if block_key >= key_1:
            at = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + at, at < vocab_size, float("-inf")).to(tl.float32)
            key = ordered_key(x) >> SPARE_BITS
            weight = tl.exp((x - top) * scale)
            count_1 += (key >= key_1).to(tl.int32)
            count_2 += (key >= key_2).to(tl.int32)
            count_3 += (key >= key_3).to(tl.int32)
            mass_1 += tl.where(key >= key_1, weight, 0.0)
            mass_2 += tl.where(key >= key_2, weight, 0.0)
            mass_3 += tl.where(key >= key_3, weight, 0.0)
    counts = tl.sum(count_1, 0), tl.sum(count_2, 0), tl.sum(count_3, 0)
    return counts, (tl.sum(mass_1, 0), tl.sum(mass_2, 0), tl.sum(mass_3, 0))


@triton.jit
def _num_passed(amounts, wanted):
    first = (amounts[0] >= wanted).to(tl.int32)
    return first + (amounts[1] >= wanted).to(tl.int32) + (amounts[2] >= wanted).to(tl.int32)


@triton.jit
def _choose(passed, none, one, two, three):
    rest = tl.where(passed == 2, two, three)
    return tl.where(passed == 0, none, tl.where(passed == 1, one, rest))


@triton.jit
def _first_pivot(top, distance, low, SPARE_BITS: tl.constexpr):
    key = ordered_key(top - distance) >> SPARE_BITS
    return tl.maximum(key.to(tl.int64), low + 1)


@triton.jit
def _search(
    row,
    temperature,
    low,
    end,
    wanted,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """The greatest key in low .. end such that the tokens at and above it reach `wanted`.

    `wanted` is a count or a mass; it is reached at `low` and not at `end`. Also returns count and
    mass of the tokens above that key.
    """
    top = row[4]
    count_above, mass_above = 0, 0.0
    key_1 = _first_pivot(top, 16.0 * temperature, low, SPARE_BITS)
    key_2 = _first_pivot(top, 6.0 * temperature, low, SPARE_BITS)
    key_3 = _first_pivot(top, 2.0 * temperature, low, SPARE_BITS)
    while end - low > 1:
        pivots = key_1.to(tl.int32), key_2.to(tl.int32), key_3.to(tl.int32)
        counts, masses = _weigh(row, pivots[0], pivots[1], pivots[2], BLOCK, SPARE_BITS)
        passed = _num_passed(counts, wanted) if BY_COUNT else _num_passed(masses, wanted)
        new_end = _choose(passed, key_1, key_2, key_3, end)
        count = _choose(passed, counts[0], counts[1], counts[2], 0)
        mass = _choose(passed, masses[0], masses[1], masses[2], 0.0)
        count_above = tl.where(new_end < end, count, count_above)
        mass_above = tl.where(new_end < end, mass, mass_above)
        end = tl.minimum(end, new_end)
        low = tl.maximum(low, _choose(passed, low, key_1, key_2, key_3))
        step = (end - low + 3) // 4
        key_1, key_2, key_3 = low + step, low + 2 * step, low + 3 * step
    return low, count_above, mass_above


@triton.jit
def _weight(key, top, scale, SPARE_BITS: tl.constexpr):
    """The weight of a token with this key. In keys of negative numbers the spare bits are ones."""
    whole = key.to(tl.int32) << SPARE_BITS
    whole = tl.where(whole < 0, whole | ((1 << SPARE_BITS) - 1), whole)
    return tl.exp((key_to_float(whole) - top) * scale)


@triton.jit
def _best_kept(
    row,
    temperature,
    min_p,
    least,
    num_equal,
    noise,
    BLOCK: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """The packed best score of tokens above `least`, and the first few equal to it, after min-p."""
    logits, best, vocab_size, num_blocks, top, scale = row
    winner = tl.full([], -(2**63), tl.int64)
    seen = 0
    for block in range(num_blocks):
        block_key = (tl.load(best + block) >> 32).to(tl.int32)
        block_weight = tl.exp((key_to_float(block_key) - top) * scale)
        if ((block_key >> SPARE_BITS) >= least) & (block_weight >= min_p):
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < vocab_size
            x = tl.load(logits + at, inside, float("-inf")).to(tl.float32)
            key = ordered_key(x) >> SPARE_BITS
            equal = (key == least).to(tl.int32)
            before = tl.cumsum(equal, 0) - equal + seen
            kept = (key > least) | ((key == least) & (before < num_equal))
            kept &= inside & (tl.exp((x - top) * scale) >= min_p)
            score = x + temperature * gumbel(at, noise[0], noise[1], noise[2])
            winner = tl.maximum(winner, tl.max(pack(ordered_key(score), at, kept), 0))
            seen += tl.sum(equal, 0)
    return winner


@triton.jit
def draw_filtered(
    row,
    top_key,
    total,
    temperature,
    top_k,
    top_p,
    min_p,
    noise,
    BLOCK: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """The packed best score among the tokens of a row that its filters keep.

    row: the logits, the packed maximum of each block, vocabulary size, number of blocks, the
    maximum logit (finite, with key `top_key`), and 1 / temperature. The weight of a token is its
    probability divided by that of the best token; `total` is the sum of all weights.
    """
    top, scale = row[4], row[5]
    # Kept are all keys above `least`, and the first `num_equal` tokens with that key.
    least = (tl.full([], MINUS_INF_KEY, tl.int32) >> SPARE_BITS).to(tl.int64)
    num_equal = tl.full([], _ALL, tl.int32)
    end = (top_key >> SPARE_BITS).to(tl.int64) + 1
    if (top_k > 0) & (top_k < row[2]):
        least, count, mass = _search(row, temperature, least, end, top_k, True, BLOCK, SPARE_BITS)
        num_equal = top_k - count
        total = mass + num_equal * _weight(least, top, scale, SPARE_BITS)
    if top_p < 1.0:
        wanted = top_p * total
        key, _, mass = _search(row, temperature, least, end, wanted, False, BLOCK, SPARE_BITS)
        weight = _weight(key, top, scale, SPARE_BITS)
        # The j-th of the equal tokens is kept if the mass before it is less than `wanted`.
        share = tl.where(weight > 0, (wanted - mass) / tl.maximum(weight, 1e-37), 1e9)
        enough = tl.maximum(tl.ceil(tl.minimum(share, 1e9)).to(tl.int32), 1)
        num_equal = tl.where(key == least, tl.minimum(num_equal, enough), enough)
        least = key
    return _best_kept(
        row, temperature, min_p, least.to(tl.int32), num_equal, noise, BLOCK, SPARE_BITS
    )
