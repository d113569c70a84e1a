"""Which page holds which positions of each row, and which cache slots a step writes."""

from __future__ import annotations

import numpy as np

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.wire.arrays import Int32Array, Int64Array


class PageTable:
    """`pages[row, column]` is the page that holds the row's positions column * page_size and up.

    It is on the host, where the scheduler's writes arrive. The indices that the device needs are
    computed from it once per step.
    """

    def __init__(self, num_rows: int, max_seq_len: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages: Int32Array = np.zeros((num_rows, -(-max_seq_len // page_size)), np.int32)

    def apply(self, batch: ForwardBatch) -> None:
        if batch.page_ids.size:
            self.pages[batch.page_rows, batch.page_columns] = batch.page_ids

    def slots(self, batch: ForwardBatch, positions: Int64Array) -> Int64Array:
        """The cache slots for the keys and values of the step's tokens, [T]."""
        rows = np.repeat(batch.rows, batch.query_lens)
        columns, offsets = np.divmod(positions, self.page_size)
        return self.pages[rows, columns].astype(np.int64) * self.page_size + offsets

    def padded_pages(self, rows: Int32Array, kv_lens: Int32Array) -> Int64Array:
        """The pages of sequences of `kv_lens` tokens, [len(rows), pages of the longest].

        Shorter sequences are padded with their own last page, so that no row reads another's pages.
        """
        last = (kv_lens - 1) // self.page_size
        columns = np.minimum(np.arange(last.max() + 1), last[:, None])
        return self.pages[rows[:, None], columns].astype(np.int64)


def token_positions(batch: ForwardBatch) -> Int64Array:
    """The position of each of the step's tokens in its sequence, [T]."""
    if batch.rows.size == batch.num_decodes:
        return batch.start_positions.astype(np.int64)
    ends = np.cumsum(batch.query_lens, dtype=np.int64)
    first = batch.start_positions - (ends - batch.query_lens)
    return np.repeat(first, batch.query_lens) + np.arange(ends[-1])
