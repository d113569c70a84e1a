"""The sampling parameters of a step in device memory, in fixed shapes."""

# Shapes: S samples including padding; P capacity of the list of (sample, token) pairs with a bias;
# R rows, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import Penalties, SamplingColumns
from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.transfer import upload
from minisrv.wire.arrays import Float32Array, Int32Array, Int64Array


@dataclass(frozen=True, slots=True)
class TokenBiases:
    """What is added to the logits of single tokens; minus infinity suppresses a token.

    No pair of sample and token occurs twice, except with minus infinity each time.
    """

    samples: Int32Array
    ids: Int32Array
    values: Float32Array

    @classmethod
    def of_step(cls, columns: SamplingColumns, penalties: Penalties | None) -> TokenBiases:
        """The suppressed tokens and the logit biases of a step; those of one token are added up."""
        samples, ids = columns.suppress_samples, columns.suppress_ids
        values = np.full(ids.size, -np.inf, np.float32)
        if penalties is None or not penalties.bias_ids.size:
            return cls(samples, ids, values)
        samples = np.concatenate([penalties.bias_samples, samples])
        ids = np.concatenate([penalties.bias_ids, ids])
        values = np.concatenate([penalties.bias_values, values])
        keys, places = np.unique(samples.astype(np.int64) << 32 | ids, return_inverse=True)
        sums = np.bincount(places, values, keys.size)
        return cls(
            (keys >> 32).astype(np.int32),
            (keys & 0xFFFFFFFF).astype(np.int32),
            sums.astype(np.float32),
        )


@dataclass(frozen=True, slots=True)
class BiasColumns:
    """TokenBiases on the device; only the first `count` of the pairs are valid."""

    samples_P: Tensor  # int32
    ids_P: Tensor  # int32
    values_P: Tensor  # float32
    count: Tensor  # int32 [1]

    @classmethod
    def from_host(cls, biases: TokenBiases, device: torch.device) -> BiasColumns:
        """Copies without waiting for the device."""
        count = np.array([biases.ids.size], np.int32)
        arrays = (biases.samples, biases.ids, biases.values, count)
        return cls(*(upload(np.ascontiguousarray(array), device) for array in arrays))


@dataclass(frozen=True, slots=True)
class CountedPenalties:
    """The penalties of all samples in order, neutral (1, 0, 0) for those without.

    Sampling adds the tokens of samples with penalties to the counts. Rows of padding lie beyond the
    counts.
    """

    counts_RV: Tensor  # see Kernels.penalize_
    columns: PenaltyColumns


@dataclass(frozen=True, slots=True)
class DeviceColumns:
    """SamplingColumns on the device, contiguous, with the position of each new token.

    Padding rows have temperature 0, and their tokens are ignored. penalties: None if they have been
    applied already, or if there are none.
    """

    temperature_S: Tensor  # float32
    top_k_S: Tensor  # int32
    top_p_S: Tensor  # float32
    min_p_S: Tensor  # float32
    seeds_S: Tensor  # int64
    choices_S: Tensor  # int32
    positions_S: Tensor  # int64 or int32
    biases: BiasColumns
    penalties: CountedPenalties | None = None

    @classmethod
    def from_host(
        cls, columns: SamplingColumns, positions_S: Int64Array, device: torch.device
    ) -> DeviceColumns:
        """Copies a step's columns without waiting for the device."""

        def given(array: np.ndarray) -> Tensor:
            return upload(np.ascontiguousarray(array), device)

        return cls(
            given(columns.temperature),
            given(columns.top_k),
            given(columns.top_p),
            given(columns.min_p),
            given(columns.seeds),
            given(columns.choices),
            given(positions_S),
            BiasColumns.from_host(TokenBiases.of_step(columns, None), device),
        )
