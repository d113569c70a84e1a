"""How much workspace FlashInfer's planner takes, by the steps of its scheduler.cuh (0.6.18)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_SMS = 132  # of an H100 or H200


@dataclass(frozen=True)
class Heads:
    """The heads of a rank, and the pages of its cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 16

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


def float_bytes(
    heads: Heads,
    query_lens: np.ndarray,
    kv_lens: np.ndarray,
    *,
    num_sms: int,
    in_graph: bool,
    uniform: bool = True,
) -> int:
    """What the plan of these sequences takes; in a graph that is `uniform` all have equally many
    queries.
    """
    queries = np.asarray(query_lens, np.int64) * heads.group
    pages = np.maximum(-(-np.asarray(kv_lens, np.int64) // heads.page_size), 1)
    # By this the size of tiles is chosen.
    length = int(queries.sum()) // len(queries)
    if in_graph and not uniform:
        length = (int(np.sum(query_lens)) - len(queries) + 1) * heads.group
    largest = 128 if heads.head_dim < 256 else 64
    tile_rows = 16 if length <= 16 else 64 if length <= 64 else largest
    tiles = -(-queries // tile_rows)
    most = 2 * num_sms // heads.num_kv_heads
    chunk, whole = max(128 // heads.page_size, 1), int(pages.max())
    # The shortest chunk of pages with which the split sequences have no more tiles than that.
    while chunk < whole:
        middle = (chunk + whole) // 2
        if int((tiles * -(-pages // middle)).sum()) > most:
            chunk = middle + 1
        else:
            whole = middle
    if not in_graph and chunk >= pages.max():
        return 0
    num_tiles = int((tiles * -(-pages // chunk)).sum())
    if in_graph:
        bound = int(tiles.sum())
        if not uniform:
            bound = -(-int(queries.sum()) // tile_rows) + len(queries) - 1
        assert num_tiles <= max(most, bound)
        num_tiles = max(most, bound)
    return heads.num_heads * num_tiles * tile_rows * (heads.head_dim + 1) * 4
