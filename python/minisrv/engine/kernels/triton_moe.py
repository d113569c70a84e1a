"""All experts of a sparse layer at once: two grouped products, in launches of fixed shape.

A pair is a token and one of its experts. Each expert's pairs get their own slots, padded to whole
tiles, so that a tile belongs to one expert. The position of tiles depends on the routing, but their
maximum number does not, and programs beyond the last tile exit at once: nothing is read back, so
the launches can be part of a CUDA graph. Each row is computed independently, so a token does not
depend on the others.
"""

# Shapes: T tokens, C hidden size, E experts, N experts per token, P = T N pairs, F features of an
# expert on this rank, G = 2 F, L slots.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.kernels.base import ExpertWeights
from minisrv.engine.kernels.triton_dependency import begin, dependent

_FEWEST_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# The number of pairs varies from step to step; do not compile variants for some of the values.
@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place(
    experts,
    slot_pairs,
    tile_experts,
    num_pairs,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per expert: counts the pairs of all experts, to know where its tiles begin, then
    writes the pairs of its slots. It also writes the experts of some tiles, not only its own. Both
    are stored plus one; 0 means that the slot or tile is unused.
    """
    begin(PDL)
    own, every = tl.program_id(0), tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    pair = tl.arange(0, BLOCK)
    start = 0
    while start < num_pairs:
        inside = start + pair < num_pairs
        expert = tl.load(experts + start + pair, inside, 0).to(tl.int32)
        counts += tl.histogram(expert, EXPERTS, inside)
        start += BLOCK
    tiles = (counts + ROWS - 1) // ROWS
    first_slot = tl.sum(tl.where(every < own, tiles, 0), 0) * ROWS
    num_slots = tl.sum(tl.where(every == own, tiles, 0), 0) * ROWS
    num_placed, start = 0, 0
    while start < num_pairs:
        expert = tl.load(experts + start + pair, start + pair < num_pairs, -1)
        is_own = (expert == own).to(tl.int32)
        rank = num_placed + tl.cumsum(is_own, 0) - is_own
        tl.store(slot_pairs + first_slot + rank, start + pair + 1, is_own != 0)
        num_placed += tl.sum(is_own, 0)
        start += BLOCK
    rest = num_placed + tl.arange(0, ROWS)
    tl.store(slot_pairs + first_slot + rest, tl.zeros([ROWS], tl.int32), rest < num_slots)
    ends = tl.cumsum(tiles, 0)
    first_tile = own * ROWS
    while first_tile < num_tiles:
        tile = first_tile + tl.arange(0, ROWS)
        owner = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        tl.store(tile_experts + tile, tl.where(owner < EXPERTS, owner + 1, 0), tile < num_tiles)
        first_tile += NUM_EXPERTS * ROWS


@triton.jit
def _gate_up(
    x,
    weights,
    slot_pairs,
    tile_experts,
    hidden,
    PER_TOKEN: tl.constexpr,
    INPUTS: tl.constexpr,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """silu(x @ gate.T) * (x @ up.T) for the tokens of a tile, written to the slots of the tile."""
    begin(PDL)
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile).to(tl.int64) - 1
    if expert >= 0:
        slots = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        pair = tl.load(slot_pairs + slots) - 1
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.arange(0, INNER)
        token = tl.maximum(pair, 0).to(tl.int64) // PER_TOKEN
        a_at = x + token[:, None] * INPUTS + inner[None, :]
        of_expert = weights + expert * (2 * FEATURES * INPUTS)
        gate_at = of_expert + column[None, :] * INPUTS + inner[:, None]
        here, there = (pair >= 0)[:, None], (column < FEATURES)[None, :]
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, INPUTS, INNER):
            a_mask, b_mask = here, there
            if INPUTS % INNER != 0:
                left = inner < INPUTS - start
                a_mask, b_mask = here & left[None, :], there & left[:, None]
            a = tl.load(a_at + start, a_mask, 0.0)
            b = tl.load(gate_at + start, b_mask, 0.0)
            c = tl.load(gate_at + FEATURES * INPUTS + start, b_mask, 0.0)
            gate = tl.dot(a, b, gate, input_precision=PRECISION)
            up = tl.dot(a, c, up, input_precision=PRECISION)
        result = gate / (1.0 + tl.exp(-gate)) * up
        to = hidden + slots[:, None] * FEATURES + column[None, :]
        tl.store(to, result.to(hidden.dtype.element_ty), here & there)


@triton.jit
def _down(
    hidden,
    weights,
    scores,
    slot_pairs,
    tile_experts,
    out,
    FEATURES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """hidden @ down.T times the score of each pair, written to the row of the pair."""
    begin(PDL)
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile).to(tl.int64) - 1
    if expert >= 0:
        slots = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        pair = tl.load(slot_pairs + slots) - 1
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.arange(0, INNER)
        a_at = hidden + slots[:, None] * FEATURES + inner[None, :]
        of_expert = weights + expert * (OUTPUTS * FEATURES)
        b_at = of_expert + column[None, :] * FEATURES + inner[:, None]
        here, there = (pair >= 0)[:, None], (column < OUTPUTS)[None, :]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, FEATURES, INNER):
            a_mask, b_mask = here, there
            if FEATURES % INNER != 0:
                left = inner < FEATURES - start
                a_mask, b_mask = here & left[None, :], there & left[:, None]
            a = tl.load(a_at + start, a_mask, 0.0)
            b = tl.load(b_at + start, b_mask, 0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        score = tl.load(scores + pair, pair >= 0, 0.0).to(tl.float32)
        to = out + pair.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
        tl.store(to, (total * score[:, None]).to(out.dtype.element_ty), here & there)


def choose_tiles(num_pairs: int, num_experts: int, bytes_each: int) -> tuple[_Tile, _Tile]:
    """Tiles of the first product, which has two accumulators, and of the second.

    Few pairs per expert, as in decode: the time is that of reading the weights. 16 rows, the
    minimum of a tensor-core instruction, waste the fewest slots; narrow tiles give each of 132 SMs
    two or three programs even for the 8 experts of a single token. Two loads ahead, of 12 KiB each,
    exceed latency times bandwidth (about 40 KB per SM) with two programs. An
    SM then has room for eight programs, which is half of its warps.
    Many pairs, as in prefill: 64 rows are one warpgroup of Hopper's wgmma; 128 rows are two, which
    read each weight for twice as many tokens. Accumulators take at most 128 registers per thread.
    With float32 a stage has half as many elements, so that the stages fit into shared memory.
    """
    average, inner = num_pairs / num_experts, 128 // bytes_each
    if average <= 16:
        return _Tile(_FEWEST_ROWS, 16, 2 * inner, 4, 3), _Tile(_FEWEST_ROWS, 32, 2 * inner, 4, 3)
    if average <= 64:
        return _Tile(64, 64, inner, 4, 4), _Tile(64, 128, inner, 4, 4)
    return _Tile(128, 128, inner, 8, 3), _Tile(128, 128, inner, 8, 4)


def placing(rows: int) -> tuple[int, int]:
    """Pairs that a program places at once, and its warps, for tiles of `rows`."""
    return (1024, 4) if rows == _FEWEST_ROWS else (4096, 16)


def _place_pairs(experts_TN: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """The pair of each slot and the expert of each tile, both plus one.

    Slots of unused tiles are not written.
    """
    num_pairs = experts_TN.numel()
    # Worst cases: every pair alone in a tile, or every expert with one row in its last tile.
    most = min(num_pairs, (num_pairs + num_experts * (rows - 1)) // rows)
    slot_pairs = torch.empty(most * rows, dtype=torch.int32, device=experts_TN.device)
    tile_experts = torch.empty(most, dtype=torch.int32, device=experts_TN.device)
    block, num_warps = placing(rows)
    _place[(num_experts,)](
        experts_TN,
        slot_pairs,
        tile_experts,
        num_pairs,
        most,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
        **dependent(),
    )
    return slot_pairs, tile_experts


def run_experts(
    x_TC: Tensor, experts: ExpertWeights, scores_TN: Tensor, experts_TN: Tensor
) -> Tensor:
    """See RunExperts. All tensors are contiguous."""
    assert all(tensor.is_contiguous() for tensor in (x_TC, scores_TN, experts_TN))
    num_tokens, hidden_size = x_TC.shape
    num_experts, _, features = experts.down_ECF.shape
    per_token = experts_TN.shape[1]
    pairs_TNC = x_TC.new_empty(num_tokens, per_token, hidden_size)
    if not num_tokens:
        return pairs_TNC
    first, second = choose_tiles(experts_TN.numel(), num_experts, x_TC.itemsize)
    slot_pairs, tile_experts = _place_pairs(experts_TN, num_experts, first.rows)
    hidden_LF = x_TC.new_empty(slot_pairs.numel(), features)
    num_tiles = tile_experts.numel()
    precision = "ieee" if x_TC.dtype is torch.float32 else "tf32"
    _gate_up[(num_tiles, triton.cdiv(features, first.columns))](
        x_TC,
        experts.gate_up_EGC,
        slot_pairs,
        tile_experts,
        hidden_LF,
        PER_TOKEN=per_token,
        INPUTS=hidden_size,
        FEATURES=features,
        ROWS=first.rows,
        COLUMNS=first.columns,
        INNER=first.inner,
        PRECISION=precision,
        num_warps=first.warps,
        num_stages=first.stages,
        **dependent(),
    )
    _down[(num_tiles, triton.cdiv(hidden_size, second.columns))](
        hidden_LF,
        experts.down_ECF,
        scores_TN,
        slot_pairs,
        tile_experts,
        pairs_TNC,
        FEATURES=features,
        OUTPUTS=hidden_size,
        ROWS=second.rows,
        COLUMNS=second.columns,
        INNER=second.inner,
        PRECISION=precision,
        num_warps=second.warps,
        num_stages=second.stages,
        **dependent(),
    )
    return pairs_TNC
