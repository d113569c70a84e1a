"""The small operators of the layers: what is neither a matrix product nor attention."""

# Shapes: T tokens in the step, S samples, C hidden size, F intermediate size, V vocabulary, H query
# heads, K key-value heads, A = H + 2 K, D head size, N cache slots; with experts: E in all, N a
# token, G = 2 F.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.wire.arrays import Int64Array


@dataclass(frozen=True, slots=True)
class QKNormWeights:
    """Scales of a normalised query head and of a normalised key head."""

    q_D: Tensor
    k_D: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """Where a layer keeps the step's keys and values, in their type or in FP8.

    What FP8 cannot hold is stored as the largest number that it can.
    """

    slots_T: Tensor  # int64
    keys_NKD: Tensor
    values_NKD: Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The gated feed-forward layers of all experts, this rank's features."""

    gate_up_EGC: Tensor  # gate's F rows, then up's
    down_ECF: Tensor


RopeRows = tuple[Tensor, Tensor]  # cosines and sines of the step's tokens, each [T, 1, D]
# All that `sampler.sample` does, in kernels of the device.
SampleRows = Callable[[Tensor, SamplingColumns, Int64Array], Tensor]
# x_TC, weights, scores_TN, experts_TN (int64) -> a new [T, C]: for each token the sum of its
# experts' outputs, times their scores.
RunExperts = Callable[[Tensor, ExpertWeights, Tensor, Tensor], Tensor]


class Kernels(Protocol):
    """One implementation a device; `torch_native` is the reference for the others."""

    # What a device has or has not; where it is None, sampler.py or the layer does without.
    sample: SampleRows | None
    run_experts: RunExperts | None

    def add_rms_norm_(
        self, x_TC: Tensor, delta_TC: Tensor | None, w_C: Tensor, eps: float
    ) -> Tensor:
        """Add `delta_TC` to `x_TC` in place, then normalise it, scaled by `w_C`.

        The result is a new tensor, or lies in `delta_TC`.
        """

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 F] -> a new [T, F]: silu of the first half times the second."""

    def norm_rotate_store_(
        self,
        qkv_TAD: Tensor,
        num_heads: int,
        norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> None:
        """Normalise and rotate queries and keys in place; store keys and values in the cache.

        Heads are H of queries, K of keys, K of values. See RotaryEmbedding for the rotation.
        """

    def mask_logits_(self, logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
        """Set the logits of samples that their mask does not allow to minus infinity.

        samples_G: int32 indices into S, on the logits' device. masks_GW: int32; bit i of word w
        allows token 32 w + i; it has at least V bits.
        """

    def argmax(self, logits_SV: Tensor) -> Tensor:
        """The first of the greatest of each row, int64 [S]; the first NaN where there is one."""
