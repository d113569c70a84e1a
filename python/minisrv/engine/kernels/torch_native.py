"""The operators in plain torch, for any device; the reference for the others."""

# Shapes: as in base.py.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


class TorchKernels:
    """Kernels for any device."""

    sample: SampleRows | None = None
    run_experts: RunExperts | None = None
    small_batch: SmallBatchKernels | None = None
    make_product: MakeProduct | None = None
    make_packed_product: MakePackedProduct | None = None

    def add_rms_norm_(self, x_TC: Tensor, delta: Tensor | None, w_C: Tensor, eps: float) -> Tensor:
        if delta is not None:
            x_TC += delta if delta.dim() == 2 else delta.sum(1)
        return F.rms_norm(x_TC, w_C.shape, w_C, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def norm_rotate_store_(
        self,
        qkv_TAD: Tensor,
        num_heads: int,
        norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> None:
        num_kv_heads = (qkv_TAD.shape[1] - num_heads) // 2
        q_THD, k_TKD, v_TKD = qkv_TAD.split_with_sizes([num_heads, num_kv_heads, num_kv_heads], 1)
        if norm is not None:
            q_THD.copy_(F.rms_norm(q_THD, norm.q_D.shape, norm.q_D, norm.eps))
            k_TKD.copy_(F.rms_norm(k_TKD, norm.k_D.shape, norm.k_D, norm.eps))
        qk = qkv_TAD[:, : num_heads + num_kv_heads]
        cos, sin = rope_rows
        swapped = qk.roll(qk.shape[-1] // 2, -1)
        qk.mul_(cos).addcmul_(swapped, sin)
        _store_(cache.keys_NKD, cache.slots_T, k_TKD)
        _store_(cache.values_NKD, cache.slots_T, v_TKD)

    def mask_logits_(self, logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
        mask_logits_(logits_SV, samples_G, masks_GW)

    def penalize_(self, logits_SV: Tensor, counts_RV: Tensor, penalties: PenaltyColumns) -> None:
        held_EV = counts_RV.index_select(0, penalties.rows_E)
        # Few tokens occur: what follows is short. On a GPU the host waits for their number.
        places, ids = held_EV.nonzero().unbind(1)
        times = held_EV[places, ids]
        repetition, frequency, presence = penalties.factors_3E.index_select(1, places).unbind()
        at = penalties.samples_E.index_select(0, places), ids
        x = logits_SV[at]
        x = torch.where(x > 0, x / repetition, x * repetition)
        times.clamp_(min=0)
        x.addcmul_(times, frequency, value=-1).addcmul_(times > 0, presence, value=-1)
        logits_SV[at] = x

    def route(self, logits_TE: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        return route(logits_TE, per_token, normalize)

    def argmax(self, logits_SV: Tensor) -> Tensor:
        return logits_SV.max(-1).indices


def _store_(cache_NKD: Tensor, slots_T: Tensor, x_TKD: Tensor) -> None:
    if cache_NKD.dtype is x_TKD.dtype:
        cache_NKD.index_copy_(0, slots_T, x_TKD)
        return
    limit = torch.finfo(cache_NKD.dtype).max
    stored_TKD = x_TKD.clamp(-limit, limit).to(cache_NKD.dtype)
    # torch has no index_copy_ for FP8.
    cache_NKD.view(torch.uint8).index_copy_(0, slots_T, stored_TKD.view(torch.uint8))


def mask_logits_(logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
    places = torch.arange(32, dtype=torch.int32, device=masks_GW.device)
    refused = ((masks_GW.unsqueeze(-1) >> places) & 1 == 0).flatten(1)
    masked = logits_SV.index_select(0, samples_G)
    masked.masked_fill_(refused[:, : logits_SV.shape[1]], -torch.inf)
    logits_SV.index_copy_(0, samples_G.long(), masked)


def route(logits_TE: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
    scores_TN, experts_TN = probs_TE.topk(per_token, -1)
    if normalize:
        scores_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
    return scores_TN.to(logits_TE.dtype), experts_TN
