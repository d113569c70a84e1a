"""Draws by the rule of the device's sampler, in float64: what its kernels are compared with."""

from __future__ import annotations

import numpy as np
import torch

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.sampling import sampler
from minisrv.wire.arrays import Int64Array

VOCAB = 300
CASES = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_p": 0.99999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1},
]
_MASK = 0xFFFFFFFF


def _mix_64(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix_32(value: torch.Tensor) -> torch.Tensor:
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def noise(columns: SamplingColumns, positions: Int64Array, vocab: int) -> torch.Tensor:
    """The kernels' Gumbel noise [S, V] in float64, where nothing of it rounds to 0 or 1."""
    with np.errstate(over="ignore"):
        state = _mix_64(columns.seeds.view(np.uint64))
        state = _mix_64(state ^ columns.choices.astype(np.uint64))
        state = _mix_64(state ^ positions.astype(np.uint64))
        last = _mix_64(state)
    low, high = (
        torch.from_numpy((part & np.uint64(_MASK)).astype(np.int64))[:, None]
        for part in (state, state >> np.uint64(32))
    )
    fraction = torch.from_numpy((last >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23
    hashed = _mix_32(_mix_32(torch.arange(vocab) ^ low) ^ high).double()
    u = (hashed + fraction[:, None]) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def expected(logits: torch.Tensor, columns: SamplingColumns, positions: Int64Array) -> torch.Tensor:
    """The same rule in torch: the sampler's own filters, by sorting in float64, and the noise."""
    kept = sampler._probabilities(logits, columns, np.arange(logits.shape[0])) > 0
    temperature = torch.from_numpy(columns.temperature).double()[:, None]
    scores = logits.double() + temperature * noise(columns, positions, logits.shape[1])
    return scores.masked_fill(~kept, -torch.inf).argmax(-1)


def random_logits(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCAB, generator=generator) * 3).to(dtype)


def assert_follows(seen: np.ndarray, wanted: np.ndarray) -> None:
    """Chi-square within five standard deviations; what is too rare is counted together."""
    assert seen[wanted == 0].sum() == 0
    rare = wanted < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    chi_square = ((seen - wanted) ** 2 / np.maximum(wanted, 1e-9))[wanted > 0].sum()
    freedom = max(1, len(wanted) - 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
