"""Top-k, top-p and min-p of one row by search, without a sort.

Top-k and top-p each keep all tokens above some logit, and the first few of those equal to it. That
logit is found by search over the ordered integers of its dtype (`ordered_key`): each pass counts
the tokens, and sums their weights, at and above three pivots, and continues between two of them.
The first pivots are a few temperatures below the best logit, where the answer usually is.

`draw_listed` searches only the tokens of the parts that triton_candidates.py has listed, all held
in registers. `draw_filtered` searches the whole row, of which it skips blocks whose best logit is
below the lowest pivot; it is for rows whose answer is not among the listed parts.
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

ALL = tl.constexpr(2**30)


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p, vocab_size):
    ranked = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0)
    return (temperature > 0) & (ranked | (min_p > 0))


@triton.jit
def _weigh_blocks(row, best, pivots, BLOCK: tl.constexpr, SPARE_BITS: tl.constexpr):
    """Count and weight of a row's tokens at and above each of three ascending keys."""
    logits, block_tops, vocab_size, num_blocks = row
    top, scale = best[1], best[2]
    count_1 = tl.zeros([BLOCK], tl.int32)
    count_2, count_3 = count_1, count_1
    mass_1 = tl.zeros([BLOCK], tl.float32)
    mass_2, mass_3 = mass_1, mass_1
    for block in range(num_blocks):
        block_key = (tl.load(block_tops + block) >> (32 + SPARE_BITS)).to(tl.int32)
        if block_key >= pivots[0]:
            at = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + at, at < vocab_size, float("-inf")).to(tl.float32)
            key = ordered_key(x) >> SPARE_BITS
            weight = tl.exp((x - top) * scale)
            count_1 += (key >= pivots[0]).to(tl.int32)
            count_2 += (key >= pivots[1]).to(tl.int32)
            count_3 += (key >= pivots[2]).to(tl.int32)
            mass_1 += tl.where(key >= pivots[0], weight, 0.0)
            mass_2 += tl.where(key >= pivots[1], weight, 0.0)
            mass_3 += tl.where(key >= pivots[2], weight, 0.0)
    counts = tl.sum(count_1, 0), tl.sum(count_2, 0), tl.sum(count_3, 0)
    return counts, (tl.sum(mass_1, 0), tl.sum(mass_2, 0), tl.sum(mass_3, 0))


@triton.jit
def _weigh_loaded(tokens, pivots, ONLY_COUNT: tl.constexpr):
    """As `_weigh_blocks`, of tokens in registers; no weights if ONLY_COUNT."""
    keys, weights = tokens
    in_1, in_2, in_3 = keys >= pivots[0], keys >= pivots[1], keys >= pivots[2]
    # Three counts in one sum: each sum over a program costs two barriers.
    joined = in_1.to(tl.int64) + (in_2.to(tl.int64) << 20) + (in_3.to(tl.int64) << 40)
    total = tl.sum(joined, 0)
    count_1, count_2 = (total & 0xFFFFF).to(tl.int32), ((total >> 20) & 0xFFFFF).to(tl.int32)
    mass_1, mass_2, mass_3 = 0.0, 0.0, 0.0
    if not ONLY_COUNT:
        mass_1 = tl.sum(tl.where(in_1, weights, 0.0), 0)
        mass_2 = tl.sum(tl.where(in_2, weights, 0.0), 0)
        mass_3 = tl.sum(tl.where(in_3, weights, 0.0), 0)
    return (count_1, count_2, (total >> 40).to(tl.int32)), (mass_1, mass_2, mass_3)


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
def search(
    tokens,
    best,
    temperature,
    low,
    end,
    wanted,
    enough,
    BY_COUNT: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """The least key in low + 1 .. end such that the tokens at and above it do not reach `wanted`.

    Also returns count and mass of these tokens. `wanted` is a count or a mass; it is not reached at
    `end`. The search stops early, at a greater key, if `enough` tokens reach that. SOURCE says what
    `tokens` is: a "row", as in `draw_filtered`; "loaded" keys and weights; or loaded "keys", whose
    weights are not used.
    """
    count_above, mass_above = 0, 0.0
    top = best[1]
    key_1 = _first_pivot(top, 16.0 * temperature, low, SPARE_BITS)
    key_2 = _first_pivot(top, 6.0 * temperature, low, SPARE_BITS)
    key_3 = _first_pivot(top, 2.0 * temperature, low, SPARE_BITS)
    while (end - low > 1) & (count_above < enough):
        pivots = key_1.to(tl.int32), key_2.to(tl.int32), key_3.to(tl.int32)
        if SOURCE == "row":
            counts, masses = _weigh_blocks(tokens, best, pivots, BLOCK, SPARE_BITS)
        else:
            counts, masses = _weigh_loaded(tokens, pivots, SOURCE == "keys")
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
    return end, count_above, mass_above


@triton.jit
def _weight(key, top, scale, SPARE_BITS: tl.constexpr):
    """The weight of a token with this key. In keys of negative numbers the spare bits are ones."""
    whole = key.to(tl.int32) << SPARE_BITS
    whole = tl.where(whole < 0, whole | ((1 << SPARE_BITS) - 1), whole)
    return tl.exp((key_to_float(whole) - top) * scale)


@triton.jit
def _find_cut(
    tokens,
    vocab_size,
    best,
    low,
    total,
    filters,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """Which tokens top-k and top-p keep: all above a key, and the first few equal to it.

    Returns that key, their number, and whether both cuts are above `low`.
    """
    top_key, top, scale = best
    temperature, top_k, top_p = filters[0], filters[1], filters[2]
    least, end = low, (top_key >> SPARE_BITS).to(tl.int64) + 1
    num_equal = tl.full([], ALL, tl.int32)
    above_low = tl.full([], 1, tl.int1)
    if (top_k > 0) & (top_k < vocab_size):
        end_k, count, mass = search(
            tokens, best, temperature, low, end, top_k, ALL, True, SOURCE, BLOCK, SPARE_BITS
        )
        least = end_k - 1
        num_equal = top_k - count
        total = mass + num_equal * _weight(least, top, scale, SPARE_BITS)
        above_low = least > low
    if top_p < 1.0:
        wanted = top_p * total
        end_p, count, mass = search(
            tokens, best, temperature, least, end, wanted, ALL, False, SOURCE, BLOCK, SPARE_BITS
        )
        key = end_p - 1
        weight = _weight(key, top, scale, SPARE_BITS)
        # The j-th of the equal tokens is kept if the mass before it is less than `wanted`.
        share = tl.where(weight > 0, (wanted - mass) / tl.maximum(weight, 1e-37), 1e9)
        enough = tl.maximum(tl.ceil(tl.minimum(share, 1e9)).to(tl.int32), 1)
        num_equal = tl.where(key == least, tl.minimum(num_equal, enough), enough)
        least = key
        above_low &= key > low
    return least.to(tl.int32), num_equal, above_low


@triton.jit
def _best_of(x, at, inside, seen, least, num_equal, best, filters, noise, SPARE_BITS: tl.constexpr):
    """The packed best score of the tokens that are kept, and how many are equal to the least.

    seen: how many tokens before these are equal to it.
    """
    top, scale = best[1], best[2]
    temperature, min_p = filters[0], filters[3]
    key = ordered_key(x) >> SPARE_BITS
    equal = (key == least).to(tl.int32)
    before = tl.cumsum(equal, 0) - equal + seen
    kept = (key > least) | ((key == least) & (before < num_equal))
    kept &= inside & (tl.exp((x - top) * scale) >= min_p)
    score = x + temperature * gumbel(at, noise[0], noise[1], noise[2])
    return tl.max(pack(ordered_key(score), at, kept), 0), tl.sum(equal, 0)


@triton.jit
def draw_filtered(row, best, total, filters, noise, BLOCK: tl.constexpr, SPARE_BITS: tl.constexpr):
    """The packed best score among the tokens of a row that its filters keep.

    row: the logits, the packed maximum of each block, vocabulary size, number of blocks. best: key
    of the maximum logit, which is finite; that logit; 1 / temperature. filters: temperature, top_k,
    top_p, min_p. The weight of a token is its probability divided by that of the best token;
    `total` is the sum of all weights.
    """
    logits, block_tops, vocab_size, num_blocks = row
    top, scale = best[1], best[2]
    low = (tl.full([], MINUS_INF_KEY, tl.int32) >> SPARE_BITS).to(tl.int64)
    least, num_equal, _ = _find_cut(
        row, vocab_size, best, low, total, filters, "row", BLOCK, SPARE_BITS
    )
    winner = tl.full([], -(2**63), tl.int64)
    seen = 0
    for block in range(num_blocks):
        block_key = (tl.load(block_tops + block) >> 32).to(tl.int32)
        block_weight = tl.exp((key_to_float(block_key) - top) * scale)
        if ((block_key >> SPARE_BITS) >= least) & (block_weight >= filters[3]):
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < vocab_size
            x = tl.load(logits + at, inside, float("-inf")).to(tl.float32)
            packed, num_found = _best_of(
                x, at, inside, seen, least, num_equal, best, filters, noise, SPARE_BITS
            )
            winner = tl.maximum(winner, packed)
            seen += num_found
    return winner


@triton.jit
def draw_listed(
    row,
    listed,
    best,
    total,
    filters,
    noise,
    PART: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """As `draw_filtered`, from the listed parts of a row; also returns whether these suffice.

    listed: the parts in ascending order, their number, and the floor, a key: no token at or above
    it is in another part.
    """
    logits, _, vocab_size, _ = row
    parts, num_listed, floor = listed
    slot = tl.arange(0, MOST_PARTS * PART)
    in_use = slot // PART < num_listed
    at = tl.load(parts + slot // PART, in_use, 0) * PART + slot % PART
    inside = in_use & (at < vocab_size)
    x = tl.load(logits + at, inside, float("-inf")).to(tl.float32)
    key = ordered_key(x) >> SPARE_BITS
    weight = tl.exp((x - best[1]) * best[2])
    low = floor.to(tl.int64) - 1
    least, num_equal, above_low = _find_cut(
        (key, weight), vocab_size, best, low, total, filters, "loaded", PART, SPARE_BITS
    )
    winner, _ = _best_of(x, at, inside, 0, least, num_equal, best, filters, noise, SPARE_BITS)
    # Without top-k and top-p the cut is at `low`; then min-p must refuse what is not listed.
    top_k, top_p, min_p = filters[1], filters[2], filters[3]
    ranked = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0)
    refused = _weight(floor, best[1], best[2], SPARE_BITS) < min_p
    everything = low <= (tl.full([], MINUS_INF_KEY, tl.int32) >> SPARE_BITS)
    return winner, everything | (ranked & above_low) | ((ranked == 0) & refused)


@triton.jit
def draw(
    row,
    listed,
    best,
    total,
    filters,
    noise,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """As `draw_filtered`, but from the listed parts of the row if these suffice."""
    winner, suffices = draw_listed(
        row, listed, best, total, filters, noise, PART, MOST_PARTS, SPARE_BITS
    )
    if suffices == 0:
        winner = draw_filtered(row, best, total, filters, noise, BLOCK, SPARE_BITS)
    return winner
