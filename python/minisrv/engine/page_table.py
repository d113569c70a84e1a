"""Which page holds which positions of each row, and where the tokens of a step go."""

from __future__ import annotations

import numpy as np

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.wire.arrays import Int32Array, Int64Array


class PageTable:
    """`pages[row, column]` is the page of the row's positions from column * page_size on.

    It lives on the host: the scheduler's writes arrive there, and every index that the device
    needs is computed from it once a step.
    """

    def __init__(self, num_rows: int, max_seq_len: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages: Int32Array = np.zeros((num_rows, -(-max_seq_len // page_size)), np.int32)

    def apply(self, batch: ForwardBatch) -> None:
        """Write the pages that the batch brings."""
        if batch.page_ids.size:
            self.pages[batch.page_rows, batch.page_columns] = batch.page_ids

    def slots(self, batch: ForwardBatch, positions: Int64Array) -> Int64Array:
        """Where the keys and values of the step's tokens go, [T]."""
        rows = np.repeat(batch.rows, batch.query_lens)
        columns, offsets = np.divmod(positions, self.page_size)
        return self.pages[rows, columns].astype(np.int64) * self.page_size + offsets

    def pages_of(self, rows: Int32Array, kv_lens: Int32Array) -> Int64Array:
        """The pages of sequences of `kv_lens` tokens, [len(rows), most pages of one].

        A shorter sequence repeats its own last page, so that no row reads what is another's.
        """
        last = (kv_lens - 1) // self.page_size
        columns = np.minimum(np.arange(last.max() + 1), last[:, None])
        return self.pages[rows[:, None], columns].astype(np.int64)


def token_positions(batch: ForwardBatch) -> Int64Array:
    """The position in its sequence of each token of the step, [T]."""
    if batch.rows.size == batch.num_decodes:
        return batch.start_positions.astype(np.int64)
    ends = np.cumsum(batch.query_lens, dtype=np.int64)
    first = batch.start_positions - (ends - batch.query_lens)
    return np.repeat(first, batch.query_lens) + np.arange(ends[-1])
