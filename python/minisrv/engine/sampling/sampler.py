"""Logits to tokens: one implementation, a column a parameter.

The order is that of OpenAI-like servers: temperature, then top-k, then top-p over what top-k left,
then min-p relative to the best token. Each row is computed by itself, in float64 and in the order
of the vocabulary, so that neither its neighbours nor their filters move its draw. On CUDA the
Triton kernels do the same by another rule (kernels/triton_sample.py says what differs).
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
    """Token ids [S], int64, on the device of the logits, whose forbidden entries are overwritten.

    positions_S: the position that each new token will have.
    """
    device = logits_SV.device
    if columns.grammar is not None:
        samples_G, masks_GW = columns.grammar.samples, columns.grammar.fill()
        kernels.mask_logits_(logits_SV, _to(samples_G, device), _to(masks_GW, device))
    if kernels.sample is not None:
        return kernels.sample(logits_SV, columns, positions_S)
    if columns.suppress_ids.size:
        samples, ids = _to(columns.suppress_samples, device), _to(columns.suppress_ids, device)
        logits_SV[samples.long(), ids.long()] = -torch.inf
    best_S = kernels.argmax(logits_SV)
    drawing = np.flatnonzero(columns.temperature > 0)
    if not drawing.size:
        return best_S
    every = drawing.size == best_S.numel()
    rows = _to(drawing, device)
    logits = logits_SV if every else logits_SV.index_select(0, rows)
    probs = _probabilities(logits, columns, drawing)
    drawn = _draw(
        probs, uniforms(columns.seeds[drawing], columns.choices[drawing], positions_S[drawing])
    )
    return drawn if every else best_S.index_copy(0, rows, drawn)


def _probabilities(logits_SV: Tensor, columns: SamplingColumns, drawing: Int64Array) -> Tensor:
    """float64 probabilities after temperature and filters, not normalised again, [S, V]."""
    device = logits_SV.device
    temperature = _to(columns.temperature[drawing], device).double().unsqueeze(1)
    probs_SV = (logits_SV.double() / temperature).softmax(-1)
    top_k, top_p, min_p = (
        column[drawing] for column in (columns.top_k, columns.top_p, columns.min_p)
    )
    ranked = np.flatnonzero((top_k > 0) | (top_p < 1))
    if ranked.size:
        rows = _to(ranked, device)
        kept = _top_k_top_p(
            probs_SV.index_select(0, rows), _to(top_k[ranked], device), _to(top_p[ranked], device)
        )
        probs_SV.index_copy_(0, rows, kept)
    if (min_p > 0).any():
        floor = probs_SV.amax(-1, keepdim=True) * _to(min_p, device).double().unsqueeze(1)
        probs_SV = probs_SV.masked_fill(probs_SV < floor, 0.0)
    return probs_SV


def _top_k_top_p(probs_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> Tensor:
    """Zero all but the k likeliest tokens, then all beyond the fewest that hold top_p of the rest.

    Of equal tokens the one with the lower id is kept.
    """
    size = probs_FV.shape[-1]
    ranked, order = probs_FV.sort(stable=True, dim=-1, descending=True)
    limit = top_k_F.masked_fill(top_k_F == 0, size).unsqueeze(1)
    ranked.masked_fill_(torch.arange(size, device=ranked.device) >= limit, 0.0)
    mass = ranked.cumsum(-1)
    before = mass - ranked
    wanted = mass[:, -1:] * top_p_F.double().unsqueeze(1)
    # The column is float32, where 1 is exact: it keeps all, whatever the sum rounds to.
    ranked.masked_fill_((before >= wanted) & (top_p_F < 1).unsqueeze(1), 0.0)
    return torch.zeros_like(probs_FV).scatter_(1, order, ranked)


def _draw(probs_SV: Tensor, uniforms_S: np.ndarray) -> Tensor:
    """The token at which the running sum passes the uniform share of the whole, [S]."""
    running = probs_SV.cumsum(-1)
    target = running[:, -1:] * _to(uniforms_S, probs_SV.device).unsqueeze(1)
    drawn = torch.searchsorted(running, target, right=True).squeeze(1)
    return drawn.clamp_(max=probs_SV.shape[-1] - 1)  # beyond it only where the logits are NaN


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
