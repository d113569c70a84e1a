"""The operators on a GPU: FlashInfer's where it has them, otherwise Triton kernels."""

# Shapes: as in base.py.

from __future__ import annotations

import torch
from torch import Tensor

from minisrv.engine.flashinfer_library import import_flashinfer
from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.kernels.base import (
    CacheSlots,
    MakePackedProduct,
    MakeProduct,
    PenaltyColumns,
    QKNormWeights,
    RopeRows,
    RunExperts,
    SampleRows,
    SmallBatchKernels,
)
from minisrv.engine.kernels.triton_mask import mask_logits
from minisrv.engine.kernels.triton_moe import run_experts
from minisrv.engine.kernels.triton_norm import add_parts_and_norm
from minisrv.engine.kernels.triton_penalize import penalize
from minisrv.engine.kernels.triton_rotate import norm_rotate_store
from minisrv.engine.kernels.triton_route import route
from minisrv.engine.kernels.triton_sample import sample_on_device
from minisrv.engine.kernels.triton_small_batch import TritonSmallBatch
from minisrv.engine.sampling.device_columns import DeviceColumns
from minisrv.wire.arrays import Int64Array


class CudaKernels:
    """Kernels for a GPU. Raises ImportError if flashinfer or triton is not installed.

    joined: with those for small batches.
    """

    make_product: MakeProduct | None = None
    make_packed_product: MakePackedProduct | None = None

    def __init__(self, *, joined: bool) -> None:
        self._flashinfer = import_flashinfer()
        self.sample: SampleRows | None = _sample
        self.run_experts: RunExperts | None = run_experts
        self.small_batch: SmallBatchKernels | None = TritonSmallBatch() if joined else None

    def add_rms_norm_(self, x_TC: Tensor, delta: Tensor | None, w_C: Tensor, eps: float) -> Tensor:
        if delta is None:
            normed: Tensor = self._flashinfer.rmsnorm(x_TC, w_C, eps)
            return normed
        if delta.dim() == 3:
            return add_parts_and_norm(x_TC, delta, w_C, eps)
        self._flashinfer.fused_add_rmsnorm(delta, x_TC, w_C, eps)
        return delta

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        out: Tensor = self._flashinfer.silu_and_mul(gate_up)
        return out

    def norm_rotate_store_(
        self,
        qkv_TAD: Tensor,
        num_heads: int,
        norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> None:
        norm_rotate_store(qkv_TAD, num_heads, norm, rope_rows, cache)

    def mask_logits_(self, logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
        mask_logits(logits_SV, samples_G, masks_GW)

    def penalize_(self, logits_SV: Tensor, counts_RV: Tensor, penalties: PenaltyColumns) -> None:
        penalize(logits_SV, counts_RV, penalties)

    def route(self, logits_TE: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        return route(logits_TE, per_token, normalize)

    def argmax(self, logits_SV: Tensor) -> Tensor:
        return torch.argmax(logits_SV, -1)


def _sample(logits_SV: Tensor, columns: SamplingColumns, positions_S: Int64Array) -> Tensor:
    given = DeviceColumns.from_host(columns, positions_S, logits_SV.device)
    out_S = torch.empty(logits_SV.shape[0], dtype=torch.int64, device=logits_SV.device)
    return sample_on_device(logits_SV, given, out_S)
