"""Measures the GPU memory that a step needs by running the largest one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from minisrv.config import ServerConfig
from minisrv.engine.forward_batch import (
    ForwardBatch,
    GrammarMasks,
    LogprobColumns,
    Penalties,
    SamplingColumns,
)
from minisrv.engine.sampling.logprobs import SLICE
from minisrv.sampling_params import MAX_LOGPROBS
from minisrv.wire.arrays import Int32Array


def largest_batch(
    num_sequences: int, num_tokens: int, page_size: int, vocab_size: int, *, on_rank_0: bool
) -> ForwardBatch:
    """New prompts of equal length in pages 0, 1, 2...; all of them sample, with every filter.

    on_rank_0: with penalties, masks, and logprobs of all samples and of a slice of prompt tokens.
    """
    length = max(1, num_tokens // num_sequences)
    columns = -(-length // page_size)
    rows = np.arange(num_sequences, dtype=np.int32)
    every = np.ones(num_sequences, np.float32)
    scored = np.arange(min(SLICE, num_sequences * length), dtype=np.int32)
    return ForwardBatch(
        step_id=0,
        num_decodes=0,
        rows=rows,
        query_lens=np.full(num_sequences, length, np.int32),
        start_positions=np.zeros(num_sequences, np.int32),
        prefill_ids=np.zeros(num_sequences * length, np.int32),
        page_rows=rows.repeat(columns),
        page_columns=np.tile(np.arange(columns, dtype=np.int32), num_sequences),
        page_ids=np.arange(num_sequences * columns, dtype=np.int32),
        sample_indices=rows,
        sampling=SamplingColumns(
            temperature=every,
            top_p=np.full(num_sequences, 0.5, np.float32),
            top_k=np.full(num_sequences, 50, np.int32),
            min_p=np.full(num_sequences, 0.01, np.float32),
            seeds=np.zeros(num_sequences, np.int64),
            choices=np.zeros(num_sequences, np.int32),
            suppress_samples=np.empty(0, np.int32),
            suppress_ids=np.empty(0, np.int32),
            grammar=_all_allowed(rows, vocab_size) if on_rank_0 else None,
        ),
        penalties=_penalties(rows, length) if on_rank_0 else None,
        prompt_logprob_tokens=scored,
        logprobs=LogprobColumns(MAX_LOGPROBS, rows, np.zeros_like(scored)) if on_rank_0 else None,
    )


def _penalties(rows: Int32Array, length: int) -> Penalties:
    """All kinds, for samples that begin with `length` zeros.

    Torch's operators allocate more when more tokens occur, but less than torch's sampling.
    """
    ones, lens = np.ones(rows.size, np.float32), np.full(rows.size, length, np.int32)
    return Penalties(
        samples=rows,
        rows=rows,
        presence=ones,
        frequency=ones,
        repetition=2 * ones,
        begin_rows=rows,
        begin_lens=lens,
        begin_prompt_lens=lens,
        begin_ids=np.zeros(rows.size * length, np.int32),
        bias_samples=rows,
        bias_ids=np.zeros_like(rows),
        bias_values=ones,
    )


def _all_allowed(samples: Int32Array, vocab_size: int) -> GrammarMasks:
    shape = (samples.size, -(-vocab_size // 32))
    return GrammarMasks(samples, lambda: np.full(shape, -1, np.int32))


def measure_workspace(run: Callable[[], object]) -> int:
    """Peak bytes that `run` allocates in addition to what is allocated now."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cuda_cache_bytes(config: ServerConfig, reserved: int) -> tuple[int, str]:
    """Bytes that --memory-fraction leaves for the KV cache after `reserved`; and an explanation."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    left = free - int(total * (1 - config.memory_fraction)) - reserved
    used = "weights, token counts, workspace and graphs"
    return left, f"--memory-fraction {config.memory_fraction} minus {used}"
