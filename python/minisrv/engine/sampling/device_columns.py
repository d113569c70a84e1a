"""The sampling parameters of a step in device memory, in fixed shapes."""

# Shapes: S samples including padding; P capacity of the list of suppressed (sample, token) pairs.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.transfer import upload
from minisrv.wire.arrays import Int64Array


@dataclass(frozen=True, slots=True)
class DeviceColumns:
    """SamplingColumns on the device, contiguous, with the position of each new token.

    Padding rows have temperature 0, and their tokens are ignored. Only the first `num_suppressed`
    of the suppressed pairs are valid.
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
        """Copies a step's columns without waiting for the device."""
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
        return cls(*(upload(np.ascontiguousarray(array), device) for array in arrays))
