"""FP8 weights of a checkpoint as plain numbers: each times the scale that it was divided by.

A scale belongs to a whole matrix, to a row, or to a block of rows and columns (DeepSeek-V3, 2024).
Every scheme is computed in the model's own type: right on any device, with the memory of that type.
"""

# Shapes: O outputs and I inputs of a matrix.

from __future__ import annotations

import torch
from torch import Tensor

from minisrv.engine.parallel.partition import Cut
from minisrv.errors import ConfigError
from minisrv.model_config import Fp8Config

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = ("_scale_inv", "_scale")  # after the name of the weight; both are factors


def dequantize(
    name: str,
    weight_OI: Tensor,
    scale: Tensor,
    shape: tuple[int, ...],
    cut: Cut | None,
    fp8: Fp8Config,
) -> Tensor:
    """The weight in float32. `shape` is the whole matrix's, of which `weight_OI` is the part `cut`.

    Raises ConfigError for a scale whose shape fits no scheme.
    """
    weight_OI = weight_OI.float()
    scale = scale.float()
    if scale.numel() == 1:
        return weight_OI.mul_(scale.reshape(()))
    outputs, inputs = shape
    if scale.shape in ((outputs,), (outputs, 1)):
        block = (1, inputs)
    elif fp8.block and scale.shape == (-(-outputs // fp8.block[0]), -(-inputs // fp8.block[1])):
        block = fp8.block
    else:
        raise ConfigError(
            f"the checkpoint's {name} has shape {list(shape)} and scales of shape "
            f"{list(scale.shape)}, which fits neither rows nor the blocks of config.json"
        )
    rows = _indices(outputs, 0, cut) // block[0]
    columns = _indices(inputs, 1, cut) // block[1]
    return weight_OI.mul_(scale.reshape(scale.shape[0], -1)[rows][:, columns])


def _indices(total: int, dim: int, cut: Cut | None) -> Tensor:
    if cut is None or cut.dim != dim:
        return torch.arange(total)
    return torch.arange(cut.start, cut.start + cut.length)
