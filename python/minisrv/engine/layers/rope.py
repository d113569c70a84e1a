"""Rotary position embedding (Su et al., 2021) and its scaling to longer contexts."""

# Shapes: T tokens in the step, H heads, D head size, P positions.

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import RopeConfig


class RotaryEmbedding:
    """Cosines and sines of all positions, gathered once per step and shared by the layers.

    The first half of a head is rotated against the second. The sines of the first half are stored
    negated, so that the rotation is `x * cos + roll(x, D / 2) * sin`.
    """

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        angles_PD = torch.outer(
            torch.arange(max_seq_len).float(), inverse_frequencies(rope, head_dim)
        )
        scale = attention_factor(rope)
        cos, sin = angles_PD.cos() * scale, angles_PD.sin() * scale
        table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
        self._table = table.to(device=device, dtype=dtype)  # [2, P, D]

    def shorten(self, num_positions: int) -> None:
        """Free the rows of later positions, which no sequence reaches."""
        if num_positions < self._table.shape[1]:
            self._table = self._table[:, :num_positions].clone()

    def rows(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the step's tokens, each [T, 1, D]."""
        cos, sin = self._table.index_select(1, positions_T).unsqueeze(2)
        return cos, sin


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of a head, float32 [D / 2]."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    match rope.rope_type:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain)
        case "factors":
            return plain / torch.tensor(rope.factors)


def attention_factor(rope: RopeConfig) -> float:
    """YaRN's factor for cosines and sines, which preserves the attention's temperature; else 1.

    Peng et al., 2023, equation 22; mscale and mscale_all_dim are DeepSeek's extension of it.
    """
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return plain * ((1 - smooth) / rope.factor + smooth)


def _yarn(rope: RopeConfig, plain: Tensor) -> Tensor:
    """YaRN's ramp between stretched and kept frequencies (Peng et al., 2023, section 3.2)."""
    half = plain.numel()

    def dimension_of(turns: float) -> float:
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return half * math.log(ratio) / math.log(rope.theta)

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(half).float() - low) / (high - low)).clamp(0, 1)
    return plain * (1 - stretched) + plain / rope.factor * stretched
