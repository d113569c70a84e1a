"""The pages of each sequence as one list, the form in which FlashInfer reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minisrv.engine.forward_batch import Int32Array
from minisrv.engine.page_table import PageTable


@dataclass(frozen=True, slots=True)
class PageLists:
    """Sequence i has `pages[starts[i] : starts[i + 1]]`, `last_page_lens[i]` tokens on the last."""

    starts: Int32Array  # [B + 1]
    pages: Int32Array  # [starts[B]]
    last_page_lens: Int32Array  # [B] 1 to the page size


def page_lists(rows: Int32Array, kv_lens: Int32Array, page_table: PageTable) -> PageLists:
    """The lists of the sequences in `rows`, whose caches hold `kv_lens` tokens, at least 1 each."""
    counts = -(-kv_lens // page_table.page_size)
    starts = np.zeros(rows.size + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    columns = np.arange(starts[-1], dtype=np.int32) - np.repeat(starts[:-1], counts)
    return PageLists(
        starts=starts,
        pages=page_table.pages[np.repeat(rows, counts), columns],
        last_page_lens=(kv_lens - 1) % page_table.page_size + 1,
    )
