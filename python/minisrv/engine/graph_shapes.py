"""The shapes of steps that are recorded as CUDA graphs. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.wire.arrays import Int32Array

CHUNKS = 8  # prefill chunks in a graph, padding included; those that a step lacks are empty
_DECODES = (0, 8, 32, 128)
_FEWEST_TOKENS = 64


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a step is padded to: `num_decodes` decodes and then, unless `num_chunk_tokens` is 0,
    CHUNKS prefill chunks with `num_chunk_tokens` tokens together.
    """

    num_decodes: int
    num_chunk_tokens: int = 0

    @property
    def num_chunks(self) -> int:
        return CHUNKS if self.num_chunk_tokens else 0

    @property
    def num_sequences(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunk_tokens

    def fits(self, batch: ForwardBatch) -> bool:
        """Whether a step with chunks can be padded to this shape."""
        padding = self.num_chunk_tokens - batch.prefill_ids.size
        num_chunks = batch.rows.size - batch.num_decodes + (padding > 0)
        return (
            batch.num_decodes <= self.num_decodes and padding >= 0 and num_chunks <= self.num_chunks
        )


def mixed_shapes(
    max_tokens: int, *, largest_graph: int, num_rows: int, max_chunk_tokens: int
) -> list[GraphShape]:
    """Shapes with chunks and up to `max_tokens` tokens, those with the fewest tokens first.

    largest_graph: the most decodes. num_rows: the most sequences. max_chunk_tokens: the most tokens
    that chunks have together; so many must fit into one sequence, which may be all padding.
    """
    most = min(largest_graph, num_rows - CHUNKS)
    if not largest_graph or most < 0:
        return []
    decodes = [*(n for n in _DECODES if n < most), most]
    totals = [max_tokens]
    while totals[0] > _FEWEST_TOKENS:
        totals.insert(0, 1 << (totals[0] - 1).bit_length() - 1)
    return [
        GraphShape(n, total - n)
        for total in totals
        for n in decodes
        if 2 * CHUNKS <= total - n <= max_chunk_tokens
    ]


def pad_to_shape(batch: ForwardBatch, shape: GraphShape, spare_row: int) -> ForwardBatch:
    """A step with chunks, padded in `spare_row`: single tokens behind the decodes, one chunk behind
    the chunks, and empty chunks. Nothing of the padding samples.
    """
    n = batch.num_decodes
    num_decodes, num_tokens = shape.num_decodes - n, shape.num_chunk_tokens - batch.prefill_ids.size
    chunks = np.zeros(shape.num_sequences - num_decodes - batch.rows.size, np.int32)
    assert chunks.size or not num_tokens
    chunks[:1] = num_tokens

    def padded(given: Int32Array, filler: int, last: Int32Array) -> Int32Array:
        return np.concatenate([given[:n], np.full(num_decodes, filler, np.int32), given[n:], last])

    samples = batch.sample_indices
    return replace(
        batch,
        num_decodes=shape.num_decodes,
        rows=padded(batch.rows, spare_row, np.full_like(chunks, spare_row)),
        query_lens=padded(batch.query_lens, 1, chunks),
        start_positions=padded(batch.start_positions, 0, np.zeros_like(chunks)),
        prefill_ids=np.concatenate([batch.prefill_ids, np.zeros(num_tokens, np.int32)]),
        sample_indices=np.where(samples < n, samples, samples + np.int32(num_decodes)),
    )
