"""Samples tokens from logits; each sampling parameter is a column with one entry per row.

The order is that of OpenAI-like servers: temperature, then top-k, then top-p over what top-k keeps,
then min-p relative to the most likely token. Each row is computed independently, in float64 and in
vocabulary order, so that other rows of the batch cannot change its token. On a GPU Triton kernels
do the same by another method (see kernels/triton_sample.py for the differences).
"""

# Shapes: S samples, F samples with a filter, V vocabulary.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.sampling.uniform import uniforms
from minisrv.wire.arrays import Int64Array


def sample(
    logits_SV: Tensor, columns: SamplingColumns, positions_S: Int64Array, kernels: Kernels
) -> Tensor:
    """Token ids [S], int64, on the device of the logits. Overwrites masked logits with -inf.

    positions_S: the position that each new token will have.
    """
    device = logits_SV.device
    if columns.grammar is not None:
        samples_G, masks_GW = columns.grammar.samples, columns.grammar.fill()
        kernels.mask_logits_(logits_SV, _to_device(samples_G, device), _to_device(masks_GW, device))
    if kernels.sample is not None:
        return kernels.sample(logits_SV, columns, positions_S)
    if columns.suppress_ids.size:
        samples, ids = (
            _to_device(columns.suppress_samples, device),
            _to_device(columns.suppress_ids, device),
        )
        logits_SV[samples.long(), ids.long()] = -torch.inf
    best_S = kernels.argmax(logits_SV)
    drawing = np.flatnonzero(columns.temperature > 0)
    if not drawing.size:
        return best_S
    every = drawing.size == best_S.numel()
    rows = _to_device(drawing, device)
    logits = logits_SV if every else logits_SV.index_select(0, rows)
    probs = _probabilities(logits, columns, drawing)
    drawn = _draw(
        probs, uniforms(columns.seeds[drawing], columns.choices[drawing], positions_S[drawing])
    )
    return drawn if every else best_S.index_copy(0, rows, drawn)


def _probabilities(logits_SV: Tensor, columns: SamplingColumns, drawing: Int64Array) -> Tensor:
    """float64 probabilities [S, V] after temperature and filters, not renormalised."""
    device = logits_SV.device
    temperature = _to_device(columns.temperature[drawing], device).double().unsqueeze(1)
    probs_SV = (logits_SV.double() / temperature).softmax(-1)
    top_k, top_p, min_p = (
        column[drawing] for column in (columns.top_k, columns.top_p, columns.min_p)
    )
    ranked = np.flatnonzero((top_k > 0) | (top_p < 1))
    if ranked.size:
        rows = _to_device(ranked, device)
        kept = _top_k_top_p(
            probs_SV.index_select(0, rows),
            _to_device(top_k[ranked], device),
            _to_device(top_p[ranked], device),
        )
        probs_SV.index_copy_(0, rows, kept)
    if (min_p > 0).any():
        floor = probs_SV.amax(-1, keepdim=True) * _to_device(min_p, device).double().unsqueeze(1)
        probs_SV = probs_SV.masked_fill(probs_SV < floor, 0.0)
    return probs_SV


def _top_k_top_p(probs_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> Tensor:
    """Keep the k most likely tokens, and of these the fewest whose mass reaches top_p; zero others.

    Among equally likely tokens, lower ids are kept first.
    """
    size = probs_FV.shape[-1]
    ranked, order = probs_FV.sort(stable=True, dim=-1, descending=True)
    limit = top_k_F.masked_fill(top_k_F == 0, size).unsqueeze(1)
    ranked.masked_fill_(torch.arange(size, device=ranked.device) >= limit, 0.0)
    mass = ranked.cumsum(-1)
    before = mass - ranked
    wanted = mass[:, -1:] * top_p_F.double().unsqueeze(1)
    # top_p is float32, where 1 is exact: it keeps all tokens regardless of rounding in the sum.
    dropped = (before >= wanted) & (top_p_F < 1).unsqueeze(1)
    ranked[:, 1:].masked_fill_(dropped[:, 1:], 0.0)
    return torch.zeros_like(probs_FV).scatter_(1, order, ranked)


def _draw(probs_SV: Tensor, uniforms_S: np.ndarray) -> Tensor:
    """Inverse-CDF sampling: the tokens [S] at which the running sum exceeds uniform * total."""
    running = probs_SV.cumsum(-1)
    target = running[:, -1:] * _to_device(uniforms_S, probs_SV.device).unsqueeze(1)
    drawn = torch.searchsorted(running, target, right=True).squeeze(1)
    return drawn.clamp_(max=probs_SV.shape[-1] - 1)  # only NaN logits lead beyond it


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
