"""FP8 matrices of a checkpoint and their scales.

In a checkpoint a scale belongs to a whole matrix, to a row, or to a block of rows and columns
(DeepSeek-V3, 2024). Here a scale always belongs to a row, or to a group of columns in a row, so
that matrices can be sharded and joined whatever their blocks were.
"""

# Shapes: T tokens, O outputs and I inputs of a matrix, G groups of inputs.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import Fp8Config
from minisrv.engine.parallel.shard import Shard
from minisrv.errors import ConfigError

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3_MAX = 448.0
LEAST_MAXIMUM = 1e-10  # lower bound for the maximum of a group, so that zeros have a scale too
SCALE_SUFFIXES = ("_scale_inv", "_scale")  # of the weight's name; both are multiplied with it


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """The number in row o and column i is `values_OI[o, i] * scales_OG[o, i // group]`."""

    values_OI: Tensor
    scales_OG: Tensor  # float32
    group: int

    @property
    def num_bytes(self) -> int:
        return self.values_OI.nbytes + self.scales_OG.nbytes

    def to(self, device: torch.device) -> Fp8Matrix:
        values_OI = self.values_OI.to(device, copy=True)
        return Fp8Matrix(values_OI, self.scales_OG.to(device), self.group)

    def dequantized(self) -> Tensor:
        """The matrix in float32."""
        scales_OI = self.scales_OG.repeat_interleave(self.group, 1)
        return self.values_OI.float().mul_(scales_OI[:, : self.values_OI.shape[1]])


def join(parts: Sequence[Fp8Matrix]) -> Fp8Matrix:
    """Stack matrices with the same inputs and groups, one below the other."""
    if len(parts) == 1:
        return parts[0]
    # Viewed as bytes, because torch.cat does not support FP8 on every device.
    values = torch.cat([part.values_OI.view(torch.uint8) for part in parts])
    scales_OG = torch.cat([part.scales_OG for part in parts])
    return Fp8Matrix(values.view(parts[0].values_OI.dtype), scales_OG, parts[0].group)


def read_matrix(
    name: str,
    values_OI: Tensor,
    scale: Tensor,
    shape: tuple[int, ...],
    shard: Shard | None,
    fp8: Fp8Config,
) -> Fp8Matrix:
    """`values_OI` is the shard of a matrix of (full) `shape`; `scale` is that of the full matrix.

    Raises ConfigError if the shape of the scale fits no scheme.
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
            f"{list(scale.shape)}, which match neither its rows nor the block size in config.json"
        )
    first_row, first_column = (shard.start if shard and shard.dim == dim else 0 for dim in (0, 1))
    num_rows, num_columns = values_OI.shape
    # If the shard starts inside a block, groups are chosen small enough not to span two blocks.
    group = num_columns if scale.shape[1] == 1 else math.gcd(block[1], first_column)
    rows = torch.arange(first_row, first_row + num_rows) // block[0]
    columns = torch.arange(first_column, first_column + num_columns, group) // block[1]
    return Fp8Matrix(values_OI, scale[rows][:, columns].contiguous(), group)


def quantize(x_TI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round to e4m3: values [T, I], and scales [T, G], one for each `group` columns of a row."""
    num_tokens, inputs = x_TI.shape
    num_groups = -(-inputs // group)
    padded = torch.nn.functional.pad(x_TI.float(), (0, num_groups * group - inputs))
    x_TGg = padded.view(num_tokens, num_groups, group)
    scales_TG = x_TGg.abs().amax(-1).clamp_(min=LEAST_MAXIMUM) / E4M3_MAX
    scaled = (x_TGg / scales_TG.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX)
    values_TI = scaled.view(num_tokens, -1)[:, :inputs].to(torch.float8_e4m3fn)
    return values_TI.contiguous(), scales_TG
