"""The memory that FlashInfer's planner takes for partial results. Does not import torch."""

from __future__ import annotations

from minisrv.engine.graph_shapes import CHUNKS


def workspace_bytes(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int,
    largest_graph: int,
    chunk_tokens: int = 0,
) -> int:
    """Bytes of FlashInfer's float workspace that are enough for every plan of the FA2 kernels.

    num_heads, num_kv_heads: of this rank. num_sms: multiprocessors of the GPU, which is an Ampere
    or newer. largest_graph: decodes in the largest CUDA graph, 0 without graphs. chunk_tokens:
    tokens of the prefill chunks in the largest graph that has any, or 0.

    The kernels pack the queries of the heads that share a key head into tiles. A plan that may
    split sequences takes, for each query head and tile, a partial output and its log-sum-exp in
    float32 (`PrefillPlanImpl` in FlashInfer's scheduler.cuh, 0.6.18):

        num_heads * num_tiles * tile_rows * (head_dim + 1) * 4

    An eager plan splits only if that makes no more than `split = 2 * num_sms // num_kv_heads`
    tiles, so it has at most these, of up to 128 rows (64 with heads of 256). The plan of a graph
    has max(split, largest_graph * ceil(group / tile_rows)) tiles, where `group` is the number of
    query heads per key head: planned with uniform_q_len 1, a sequence is a single query. The plan
    of the CHUNKS chunks in a graph has as many tiles as their tokens may be spread over:
    max(split, ceil(chunk_tokens * group / tile_rows) + CHUNKS - 1).
    """
    split, group = 2 * num_sms // num_kv_heads, num_heads // num_kv_heads
    rows = split * _tile_rows(None, head_dim)
    if largest_graph:
        tile_rows = _tile_rows(group, head_dim)
        rows = max(rows, max(split, largest_graph * -(-group // tile_rows)) * tile_rows)
    if chunk_tokens:
        tile_rows = _tile_rows((chunk_tokens - CHUNKS + 1) * group, head_dim)
        tiles = -(-chunk_tokens * group // tile_rows) + CHUNKS - 1
        rows = max(rows, max(split, tiles) * tile_rows)
    return num_heads * rows * (head_dim + 1) * 4


def _tile_rows(num_queries: int | None, head_dim: int) -> int:
    """Rows of a tile for sequences of `num_queries` packed queries; the most if that is None.

    See `FA2DetermineCtaTileQ` in FlashInfer's utils.cuh.
    """
    if (num_queries is None or num_queries > 64) and head_dim < 256:
        return 128
    return 64 if num_queries is None or num_queries > 16 else 16
