"""The sampling parameters of a step in the device's memory, in shapes that need not change."""

# Shapes: S samples, padding included; P pairs that fit into the list of suppressed tokens.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.wire.arrays import Int64Array


@dataclass(frozen=True, slots=True)
class DeviceColumns:
    """SamplingColumns on the device, contiguous, with the position of each new token.

    A row of padding has temperature 0; its token means nothing. Of the suppressed pairs the first
    `num_suppressed` count, whatever lies behind them.
    """

    temperature_S: Tensor  # float32
    top_k_S: Tensor  # int32
    top_p_S: Tensor  # float32
    min_p_S: Tensor  # float32
    seeds_S: Tensor  # int64
    choices_S: Tensor  # int32
    positions_S: Tensor  # int64 or int32
    suppress_samples_P: Tensor  # int32
    suppress_ids_P: Tensor  # int32
    num_suppressed: Tensor  # int32 [1]

    @classmethod
    def from_host(
        cls, columns: SamplingColumns, positions_S: Int64Array, device: torch.device
    ) -> DeviceColumns:
        """A step's columns, copied without waiting for the device."""
        arrays = (
            columns.temperature,
            columns.top_k,
            columns.top_p,
            columns.min_p,
            columns.seeds,
            columns.choices,
            positions_S,
            columns.suppress_samples,
            columns.suppress_ids,
            np.array([columns.suppress_ids.size], np.int32),
        )
        return cls(*(_to(array, device) for array in arrays))


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
