"""Samples tokens on the device, in launches of fixed shape, without softmax or sort.

Sampling uses the Gumbel-max rule: the token with the greatest logit + temperature * noise; greedy
rows have no noise. The noise of a row is derived from its (seed, choice, position), with the same
64 bits as in sampling/uniform.py, hashed with the token id (triton_noise.py). It depends neither on
other rows nor on the size of the batch.

Two kernels apply penalties (triton_penalize.py) and biases; the bias of a suppressed token is -inf.
The next one reads the logits once, one block per program, and stores the best score of each block;
or, for a row with a filter, where noise is added later, the maximum logit and the mass of the
block, and the maxima of its parts. Another lists the parts of such a row that matter
(triton_candidates.py). The last picks the best block of each row; if the row has a filter, it first
searches the listed parts for the least logit that top-k and top-p keep, or the whole row if that is
not among them (triton_filter.py).

Differences from sampling/sampler.py: the sampled tokens differ, because the rule does. Sums are in
float32, so top-p may keep one token more or fewer if the mass before it is within about 1e-6 of
top_p; min-p also compares in float32. As there, of equal logits lower ids are kept first. A row
with NaN returns its first NaN, and one with +inf the first of these; in sampler.py the result is
undefined. A row that is all -inf returns token 0.
"""

# Shapes: S samples, V vocabulary, N blocks of a row.

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.triton_candidates import list_parts
from minisrv.engine.kernels.triton_dependency import begin, dependent
from minisrv.engine.kernels.triton_filter import draw, is_filtered
from minisrv.engine.kernels.triton_noise import (
    INF_KEY,
    MINUS_INF_KEY,
    gumbel,
    key_to_float,
    ordered_key,
    pack,
    row_keys,
)
from minisrv.engine.kernels.triton_penalize import count_token, penalize
from minisrv.engine.sampling.device_columns import BiasColumns, CountedPenalties, DeviceColumns

# 38 blocks per row for a vocabulary of 152k: four rows give each of 132 SMs a program, and one row
# takes only a few microseconds. A block is also the unit that the search of a filter can skip. Its
# size must not depend on the batch: masses are summed block by block, and a row's result must not
# depend on other rows.
_BLOCK = 4096
# Tokens of a part, and how many parts are listed at most: 4096 tokens, 8 per thread of the last
# kernel. A part of 32 float32 logits is one cache line.
_PART, _MOST_PARTS = 32, 128
_BIAS_BLOCK = 256
# Low bits of a float32 that the dtype never sets; the search skips them.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


# The pairs are among the words of a step, or, if too many, in tensors of their own: one variant.
@triton.jit(do_not_specialize_on_alignment=["samples", "ids", "values", "count"])
def _add_biases(
    logits, samples, ids, values, count, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    begin(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(count)
    row = tl.load(samples + i, inside, 0).to(tl.int64)
    at = logits + row * row_stride + tl.load(ids + i, inside, 0)
    value = tl.load(values + i, inside, 0.0)
    given = tl.load(at, inside, 0.0)
    suppressed = value == float("-inf")
    x = tl.where(suppressed, value, given.to(tl.float32) + value)
    tl.store(at, x.to(given.dtype), inside)


@triton.jit
def _score_blocks(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    choices,
    positions,
    best,
    masses,
    part_tops,
    vocab_size,
    row_stride,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row and block: its best score; or its maximum logit, its mass, and the keys
    of its parts' maximum logits.
    """
    begin(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab_size
    score = tl.load(logits + row * row_stride + at, inside, float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row)
    slot = row * NUM_BLOCKS + block
    if is_filtered(temperature, tl.load(top_ks + row), top_p, min_p, vocab_size):
        top = tl.max(score, 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp((score - top) / tl.maximum(temperature, 1e-30))
        tl.store(masses + slot, tl.sum(weights, 0))
        parts: tl.constexpr = BLOCK // PART
        keys = tl.max(tl.reshape(ordered_key(score), [parts, PART]), 1)
        tl.store(part_tops + slot * parts + tl.arange(0, parts), keys)
    elif temperature > 0:
        low, high, fraction = row_keys(
            tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)
        )
        score += temperature * gumbel(at, low, high, fraction)
    packed = pack(ordered_key(score), at, inside)
    tl.store(best + slot, tl.max(packed, 0))


@triton.jit
def _pick_best(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    choices,
    positions,
    best,
    masses,
    parts,
    nums_listed,
    floors,
    counts,
    rows,
    factors,
    factor_stride,
    out,
    vocab_size,
    row_stride,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    SPARE_BITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row. counts: None if there are no penalties."""
    begin(PDL)
    row, blocks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    there = blocks < NUM_BLOCKS
    tops = tl.load(best + row * NUM_BLOCKS + blocks, there, -(2**63))
    winner = tl.max(tops, 0)
    temperature = tl.load(temperatures + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    top_key = (winner >> 32).to(tl.int32)
    filtered = is_filtered(temperature, top_k, top_p, min_p, vocab_size)
    if filtered & (top_key < INF_KEY) & (top_key > MINUS_INF_KEY):
        top, scale = key_to_float(top_key), 1.0 / tl.maximum(temperature, 1e-30)
        block_tops = key_to_float((tops >> 32).to(tl.int32))
        mass = tl.load(masses + row * NUM_BLOCKS + blocks, there, 0.0)
        total = tl.sum(tl.where(there, mass * tl.exp((block_tops - top) * scale), 0.0), 0)
        winner = draw(
            (logits + row * row_stride, best + row * NUM_BLOCKS, vocab_size, NUM_BLOCKS),
            (parts + row * MOST_PARTS, tl.load(nums_listed + row), tl.load(floors + row)),
            (top_key, top, scale),
            total,
            (temperature, top_k, top_p, min_p),
            row_keys(tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row)),
            BLOCK,
            PART,
            MOST_PARTS,
            SPARE_BITS,
        )
    token = 0x7FFFFFFF - (winner & 0x7FFFFFFF)
    tl.store(out + row, token)
    if counts is not None:
        count_token(counts, rows, factors, factor_stride, row, token, vocab_size)


def sample_on_device(logits_SV: Tensor, columns: DeviceColumns, out_S: Tensor) -> Tensor:
    """Sample a token per row into `out_S` (int64 or int32); returns `out_S`.

    Nothing is read back and no shape depends on the data, so it can be part of a CUDA graph. Logits
    are bfloat16, float16 or float32, contiguous within a row; penalties and biases change them.
    """
    assert logits_SV.stride(1) == 1
    if columns.penalties is not None:
        penalize(logits_SV, columns.penalties.counts_RV, columns.penalties.columns)
    _apply_biases(logits_SV, columns.biases)
    _draw(logits_SV, columns, out_S)
    return out_S


def _apply_biases(logits_SV: Tensor, biases: BiasColumns) -> None:
    capacity = biases.ids_P.numel()
    if capacity:
        _add_biases[(triton.cdiv(capacity, _BIAS_BLOCK),)](
            logits_SV,
            biases.samples_P,
            biases.ids_P,
            biases.values_P,
            biases.count,
            logits_SV.stride(0),
            BLOCK=_BIAS_BLOCK,
            **dependent(),
        )


def _counting(
    penalties: CountedPenalties | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """What the last kernel needs to count the tokens."""
    if penalties is None:
        return None, None, None, 0
    factors = penalties.columns.factors_3E
    return penalties.counts_RV, penalties.columns.rows_E, factors, factors.stride(0)


def _draw(logits_SV: Tensor, columns: DeviceColumns, out_S: Tensor) -> None:
    size, vocab_size = logits_SV.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    num_parts = num_blocks * (_BLOCK // _PART)
    empty = partial(torch.empty, dtype=torch.int32, device=logits_SV.device)
    best = empty(size, num_blocks, dtype=torch.int64)
    masses = empty(size, num_blocks, dtype=torch.float32)
    part_tops = empty(size, num_parts)
    listed = empty(size, _MOST_PARTS), empty(size), empty(size)
    filters = (columns.temperature_S, columns.top_k_S, columns.top_p_S, columns.min_p_S)
    noise = (columns.seeds_S, columns.choices_S, columns.positions_S)
    sizes = (vocab_size, logits_SV.stride(0))
    spare_bits = _SPARE_BITS[logits_SV.dtype]
    # The first has 16 logits per thread, four 16-byte loads in flight. The others have one program
    # per row, so 16 warps are needed to hide the latency of their loads.
    _score_blocks[(size, num_blocks)](
        logits_SV,
        *filters,
        *noise,
        best,
        masses,
        part_tops,
        *sizes,
        NUM_BLOCKS=num_blocks,
        BLOCK=_BLOCK,
        PART=_PART,
        num_warps=8,
        **dependent(),
    )
    list_parts[(size,)](
        part_tops,
        *filters,
        *listed,
        vocab_size,
        NUM_PARTS=num_parts,
        PARTS=triton.next_power_of_2(num_parts),
        MOST_PARTS=_MOST_PARTS,
        SPARE_BITS=spare_bits,
        num_warps=16,
        **dependent(),
    )
    _pick_best[(size,)](
        logits_SV,
        *filters,
        *noise,
        best,
        masses,
        *listed,
        *_counting(columns.penalties),
        out_S,
        *sizes,
        NUM_BLOCKS=num_blocks,
        BLOCK=_BLOCK,
        BLOCKS=triton.next_power_of_2(num_blocks),
        PART=_PART,
        MOST_PARTS=_MOST_PARTS,
        SPARE_BITS=spare_bits,
        num_warps=16,
        **dependent(),
    )
