"""What stands in for a GPU, so that the step that is made for one runs here, every line of it.

FlashInfer's wrappers and our Triton kernels are replaced by torch, which does the same; a recorded
graph replays by doing the work again on the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minisrv.config import ServerConfig
from minisrv.engine import rank_engine
from minisrv.engine.attention.workspace import workspace_bytes
from minisrv.engine.device_runner import DeviceKernels
from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.kernels.torch_native import TorchKernels, mask_logits_
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.model_size import largest_chunk_graph, largest_graph
from minisrv.engine.sampling.device_columns import DeviceColumns
from minisrv.engine.sampling.sampler import sample
from minisrv.engine.step_buffer import StepLimits, StepTensors
from tests.support.flashinfer_planner import NUM_SMS
from tests.support.flashinfer_wrappers import documented, documented_xqa

# What a step has not written must not be read: the parts that it does not fill hold this.
STALE = -(2**30)


class Repeat:
    """A Recorder; `replays` counts what was replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work: Callable[[], object]) -> Callable[[], None]:
        work()
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


def expand(tensors: StepTensors, limits: StepLimits, num_sequences: int) -> None:
    """See triton_expand.expand."""
    words, table = tensors.words, tensors.page_table
    count = int(words["num_writes"])
    written = words["write_rows"][:count].long(), words["write_columns"][:count].long()
    table[written] = words["write_pages"][:count]
    num_decodes = int(words["num_decodes"])
    for computed in (tensors.ids_T, tensors.positions_T, tensors.slots_T, tensors.pages):
        computed.fill_(STALE)
    for i in range(num_sequences):
        row, start = int(words["rows"][i]), int(words["start_positions"][i])
        first, end = words["query_starts"][i : i + 2].tolist()
        positions = torch.arange(start, start + end - first)
        pages = table[row, positions // limits.page_size].long()
        tensors.positions_T[first:end] = positions
        tensors.slots_T[first:end] = pages * limits.page_size + positions % limits.page_size
        if i < num_decodes:
            tensors.ids_T[first:end] = tensors.last_token[row]
        else:
            given = words["prefill_ids"][first - num_decodes : end - num_decodes]
            tensors.ids_T[first:end] = given.long()
        first, end = words["page_starts"][i : i + 2].tolist()
        tensors.pages[first:end] = table[row, : end - first]


def sample_by_torch(logits_SV: torch.Tensor, columns: DeviceColumns, out_S: torch.Tensor) -> Any:
    """See sample_on_device; the draws are those of the step on the host."""
    counted, biases = columns.penalties, columns.biases
    if counted is not None:
        penalties = _not_neutral(counted.columns)
        TorchKernels().penalize_(logits_SV, counted.counts_RV, penalties)
    count = int(biases.count)
    at = biases.samples_P[:count].long(), biases.ids_P[:count].long()
    logits_SV.index_put_(at, biases.values_P[:count], accumulate=True)
    host = SamplingColumns(
        temperature=columns.temperature_S.numpy(),
        top_p=columns.top_p_S.numpy(),
        top_k=columns.top_k_S.numpy(),
        min_p=columns.min_p_S.numpy(),
        seeds=columns.seeds_S.numpy(),
        choices=columns.choices_S.numpy(),
        suppress_samples=np.empty(0, np.int32),
        suppress_ids=np.empty(0, np.int32),
    )
    positions = columns.positions_S.numpy().astype(np.int64)
    out_S.copy_(sample(logits_SV, host, positions, TorchKernels()))
    if counted is not None:
        at = penalties.rows_E.long(), out_S[penalties.samples_E].long()
        counted.counts_RV[at] = counted.counts_RV[at].clamp(0, 2**15 - 2) + 1
    return out_S


def _not_neutral(columns: PenaltyColumns) -> PenaltyColumns:
    """Those that change something; the rows of the others may lie beyond the counts."""
    neutral = torch.tensor([[1.0], [0.0], [0.0]])
    chosen = (columns.factors_3E != neutral).any(0)
    return PenaltyColumns(
        columns.samples_E[chosen], columns.rows_E[chosen], columns.factors_3E[:, chosen]
    )


def use_device_runner(monkeypatch: pytest.MonkeyPatch) -> Repeat:
    """Have engines on the CPU compute their steps as on a GPU."""
    import flashinfer

    from minisrv.engine.attention.flashinfer import FlashInferAttention

    patch_flashinfer(monkeypatch)
    assert flashinfer

    def choose_backends(config: ServerConfig, pool: KVPool, num_heads: int) -> Any:
        num_bytes = workspace_bytes(
            num_heads=num_heads,
            num_kv_heads=pool.num_kv_heads,
            head_dim=pool.head_dim,
            num_sms=NUM_SMS,
            largest_graph=largest_graph(config),
            chunk_tokens=largest_chunk_graph(config),
        )
        return TorchKernels(), FlashInferAttention(pool, num_heads, num_bytes)

    repeat = Repeat()
    monkeypatch.setattr(rank_engine, "choose_backends", choose_backends)
    monkeypatch.setattr(
        rank_engine, "device_kernels", lambda: DeviceKernels(expand, sample_by_torch, mask_logits_)
    )
    monkeypatch.setattr(rank_engine, "new_recorder", lambda: repeat)
    return repeat


def patch_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the documented wrappers in the place of the real ones."""
    import flashinfer

    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    # The decode wrapper's `plan` hands its keywords on to this one.
    decode_plan = getattr(decode, "_plan_impl", decode.plan)
    monkeypatch.setattr(flashinfer, decode.__name__, documented(decode, decode_plan))
    monkeypatch.setattr(flashinfer, prefill.__name__, documented(prefill, prefill.plan))
    monkeypatch.setattr(flashinfer, "xqa", documented_xqa(flashinfer.xqa))
