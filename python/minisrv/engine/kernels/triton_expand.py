"""Expands a step's words on the device: page table, input ids, positions, slots, page lists."""

from __future__ import annotations

import triton
import triton.language as tl

from minisrv.engine.kernels.triton_dependency import begin, dependent
from minisrv.engine.step_buffer import StepLimits, StepTensors

_BLOCK = 256


@triton.jit
def _write_pages(
    page_table, width, rows, columns, pages, count, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    begin(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(count)
    row = tl.load(rows + at, inside, 0).to(tl.int64)
    column = tl.load(columns + at, inside, 0)
    tl.store(page_table + row * width + column, tl.load(pages + at, inside, 0), inside)


@triton.jit
def _expand(
    rows,
    start_positions,
    query_starts,
    page_starts,
    num_decodes,
    prefill_ids,
    page_table,
    width,
    last_token,
    ids,
    positions,
    slots,
    pages,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per sequence: loops over its tokens, then over its pages."""
    begin(PDL)
    sequence = tl.program_id(0)
    row = tl.load(rows + sequence).to(tl.int64)
    start = tl.load(start_positions + sequence)
    first, end = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    decodes = tl.load(num_decodes)
    is_decode = sequence < decodes
    last = tl.load(last_token + row)
    table = page_table + row * width
    token = first
    while token < end:
        at = token + tl.arange(0, BLOCK)
        inside = at < end
        position = start + at - first
        page = tl.load(table + position // PAGE_SIZE, inside, 0).to(tl.int64)
        # A decode is one token, so prefill tokens start at index `decodes`.
        given = tl.load(prefill_ids + at - decodes, inside & (at >= decodes), 0)
        tl.store(ids + at, tl.where(is_decode, last, given.to(tl.int64)), inside)
        tl.store(positions + at, position.to(tl.int64), inside)
        tl.store(slots + at, page * PAGE_SIZE + position % PAGE_SIZE, inside)
        token += BLOCK
    page_first, page_end = tl.load(page_starts + sequence), tl.load(page_starts + sequence + 1)
    listed = page_first
    while listed < page_end:
        at = listed + tl.arange(0, BLOCK)
        inside = at < page_end
        tl.store(pages + at, tl.load(table + at - page_first, inside, 0), inside)
        listed += BLOCK


def expand(tensors: StepTensors, limits: StepLimits, num_sequences: int) -> None:
    """Apply the page writes in the words of `tensors`, then fill everything derived from the words.

    No shape depends on the data and nothing is read back, so it can be part of a CUDA graph.
    """
    words = tensors.words
    width = tensors.page_table.shape[1]
    _write_pages[(triton.cdiv(limits.num_writes, _BLOCK),)](
        tensors.page_table,
        width,
        words["write_rows"],
        words["write_columns"],
        words["write_pages"],
        words["num_writes"],
        BLOCK=_BLOCK,
        num_warps=4,
        **dependent(),
    )
    _expand[(num_sequences,)](
        words["rows"],
        words["start_positions"],
        words["query_starts"],
        words["page_starts"],
        words["num_decodes"],
        words["prefill_ids"],
        tensors.page_table,
        width,
        tensors.last_token,
        tensors.ids_T,
        tensors.positions_T,
        tensors.slots_T,
        tensors.pages,
        PAGE_SIZE=limits.page_size,
        BLOCK=_BLOCK,
        num_warps=4,
        **dependent(),
    )
