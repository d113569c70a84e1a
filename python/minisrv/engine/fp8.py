"""FP8 matrices of a checkpoint: small numbers, each times the scale that it was divided by.

A scale belongs to a whole matrix, to a row, or to a block of rows and columns (DeepSeek-V3, 2024).
All become scales of a row, or of a group of columns in a row: so parts of matrices can be cut and
matrices with scales of their own be joined, whatever the blocks were.
"""

# Shapes: T tokens, O outputs and I inputs of a matrix, G groups of inputs.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import Fp8Config
from minisrv.engine.parallel.shard import Cut
from minisrv.errors import ConfigError

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3_MAX = 448.0
LEAST_MAXIMUM = 1e-10  # of what shares a scale: zeros have one, too
SCALE_SUFFIXES = ("_scale_inv", "_scale")  # after the name of the weight; both are factors


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """Column i of row o stands for `values_OI[o, i] * scales_OG[o, i // group]`."""

    values_OI: Tensor
    scales_OG: Tensor  # float32
    group: int

    @property
    def num_bytes(self) -> int:
        """Of numbers and scales."""
        return self.values_OI.nbytes + self.scales_OG.nbytes

    def to(self, device: torch.device) -> Fp8Matrix:
        """A copy in memory of its own."""
        values_OI = self.values_OI.to(device, copy=True)
        return Fp8Matrix(values_OI, self.scales_OG.to(device), self.group)

    def dequantized(self) -> Tensor:
        """The matrix in float32."""
        scales_OI = self.scales_OG.repeat_interleave(self.group, 1)
        return self.values_OI.float().mul_(scales_OI[:, : self.values_OI.shape[1]])


def join(parts: Sequence[Fp8Matrix]) -> Fp8Matrix:
    """Matrices of the same inputs and groups, one below the other."""
    if len(parts) == 1:
        return parts[0]
    # As bytes, which can be joined on any device.
    values = torch.cat([part.values_OI.view(torch.uint8) for part in parts])
    scales_OG = torch.cat([part.scales_OG for part in parts])
    return Fp8Matrix(values.view(parts[0].values_OI.dtype), scales_OG, parts[0].group)


def read_matrix(
    name: str,
    values_OI: Tensor,
    scale: Tensor,
    shape: tuple[int, ...],
    cut: Cut | None,
    fp8: Fp8Config,
) -> Fp8Matrix:
    """The part `cut`, which is `values_OI`, of a matrix of `shape` with `scale`.

    Raises ConfigError for a scale whose shape fits no scheme.
    """
    scale, (outputs, inputs) = scale.float(), shape
    if scale.numel() == 1:
        block, scale = (outputs, inputs), scale.reshape(1, 1)
    elif scale.shape in ((outputs,), (outputs, 1)):
        block, scale = (1, inputs), scale.reshape(outputs, 1)
    elif fp8.block and scale.shape == (-(-outputs // fp8.block[0]), -(-inputs // fp8.block[1])):
        block = fp8.block
    else:
        raise ConfigError(
            f"the checkpoint's {name} has shape {list(shape)} and scales of shape "
            f"{list(scale.shape)}, which fits neither rows nor the blocks of config.json"
        )
    first_row, first_column = (cut.start if cut and cut.dim == dim else 0 for dim in (0, 1))
    num_rows, num_columns = values_OI.shape
    # Where the part begins within a block, the groups are so small that none is in two blocks.
    group = num_columns if scale.shape[1] == 1 else math.gcd(block[1], first_column)
    rows = torch.arange(first_row, first_row + num_rows) // block[0]
    columns = torch.arange(first_column, first_column + num_columns, group) // block[1]
    return Fp8Matrix(values_OI, scale[rows][:, columns].contiguous(), group)


def quantize(x_TI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 numbers [T, I] and the scales [T, G] of each `group` of their columns."""
    num_tokens, inputs = x_TI.shape
    num_groups = -(-inputs // group)
    padded = torch.nn.functional.pad(x_TI.float(), (0, num_groups * group - inputs))
    x_TGg = padded.view(num_tokens, num_groups, group)
    scales_TG = x_TGg.abs().amax(-1).clamp_(min=LEAST_MAXIMUM) / E4M3_MAX
    scaled = (x_TGg / scales_TG.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX)
    values_TI = scaled.view(num_tokens, -1)[:, :inputs].to(torch.float8_e4m3fn)
    return values_TI.contiguous(), scales_TG
