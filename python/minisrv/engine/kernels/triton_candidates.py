"""Lists the parts of a row among which its filters find their tokens.

A part is a few consecutive tokens. triton_sample.py writes down the greatest logit of each; here
one program per row lists the parts with the greatest of these. A row's k greatest tokens are in the
parts with the k greatest maxima, so the list suffices for any top-k up to half its room, unless
many maxima are equal. For top-p and min-p it suffices if they keep few tokens, or tokens that are
close together. triton_filter.py notices when it does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minisrv.engine.kernels.triton_dependency import begin
from minisrv.engine.kernels.triton_filter import is_filtered, search
from minisrv.engine.kernels.triton_noise import MINUS_INF_KEY, key_to_float


@triton.jit
def list_parts(
    part_tops,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    parts,
    nums_listed,
    floors,
    vocab_size,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    SPARE_BITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per row; see `draw_listed` for what it writes.

    The floor is a key that between half of and all MOST_PARTS parts reach, fewer only where many
    are equal, or where all others are at minus infinity.
    """
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row)
    if is_filtered(temperature, tl.load(top_ks + row), top_p, min_p, vocab_size):
        at = tl.arange(0, PARTS)
        there = at < NUM_PARTS
        given = tl.load(part_tops + row * NUM_PARTS + at, there, MINUS_INF_KEY)
        top_key, key = tl.max(given, 0), given >> SPARE_BITS
        low = (tl.full([], MINUS_INF_KEY, tl.int32) >> SPARE_BITS).to(tl.int64)
        floor, _, _ = search(
            (key, key),
            (top_key, key_to_float(top_key), 1.0),
            temperature,
            low,
            (top_key >> SPARE_BITS).to(tl.int64) + 1,
            MOST_PARTS + 1,
            MOST_PARTS // 2,
            True,
            "keys",
            PARTS,
            SPARE_BITS,
        )
        listed = (key >= floor.to(tl.int32)).to(tl.int32)
        slot = tl.cumsum(listed, 0) - listed
        tl.store(parts + row * MOST_PARTS + slot, at, listed != 0)
        tl.store(nums_listed + row, tl.sum(listed, 0))
        tl.store(floors + row, floor.to(tl.int32))
