"""The operators of the layers, except attention."""

# Shapes: T tokens in the step, S samples, C hidden size, F intermediate size, V vocabulary, H query
# heads, K key-value heads, A = H + 2 K, D head size, N cache slots, I inputs and O outputs of a
# matrix. With penalties: R rows, E of the samples. With experts: E experts, N of them per token,
# G = 2 F.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.packed import PackedMatrix
from minisrv.wire.arrays import Int64Array


@dataclass(frozen=True, slots=True)
class QKNormWeights:
    """Weights of the norms of query heads and key heads."""

    q_D: Tensor
    k_D: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class NormWeight:
    """Of the norm before a layer."""

    w_C: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class CacheSlots:
    """Where a layer stores the step's keys and values, in their own dtype or in FP8.

    Values outside the range of FP8 are clamped to it.
    """

    slots_T: Tensor  # int64
    keys_NKD: Tensor
    values_NKD: Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The gated feed-forward layers of all experts; of each, this rank's features."""

    gate_up_EGC: Tensor  # the F rows of gate, then those of up
    down_ECF: Tensor


@dataclass(frozen=True, slots=True)
class PenaltyColumns:
    """The penalties of E samples, on the logits' device; no sample occurs twice."""

    samples_E: Tensor  # int64, indices into S
    rows_E: Tensor  # integers, their rows of the token counts
    factors_3E: Tensor  # float32: repetition, frequency, presence


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The weights of one layer: attention and a gated feed-forward layer, on a single rank."""

    input_norm: NormWeight
    qkv: Product
    heads: tuple[int, int, int]  # H, K, D
    qk_norm: QKNormWeights | None
    out: Product
    post_norm: NormWeight
    gate_up: Product
    down: Product
    intermediate_size: int


RopeRows = tuple[Tensor, Tensor]  # cosines and sines of the step's tokens, each [T, 1, D]
# Does all that `sampler.sample` does, in kernels of the device.
SampleRows = Callable[[Tensor, SamplingColumns, Int64Array], Tensor]
# x_TC, weights, scores_TN, experts_TN (int64) -> a new [T, N, C]: for each token the outputs of its
# experts, times their scores.
RunExperts = Callable[[Tensor, ExpertWeights, Tensor, Tensor], Tensor]
# x_TI -> a new x_TI @ weight_OI.T + bias_O, contiguous.
Product = Callable[[Tensor], Tensor]
# x_TI, out_TO -> x_TI @ weight_OI.T in float32, contiguous: a new tensor, or `out_TO` if given.
Float32Product = Callable[[Tensor, Tensor | None], Tensor]
# weight_OI, bias_O, dtype of the results -> their product, or None if the weights do not suit.
MakeProduct = Callable[[Tensor, Tensor | None, torch.dtype], Product | None]


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """A Product of torch."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)


class PackedProduct(Protocol):
    """x_TI -> a new x_TI @ matrix.T + bias_O, contiguous, for a matrix that stays packed."""

    def __call__(self, x_TI: Tensor, /) -> Tensor: ...

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        """A new [N, I]: N rows of the matrix, without the bias. ids_N: int64."""


# matrix, bias_O, dtype of the results -> their product, or None if the matrix does not suit.
MakePackedProduct = Callable[[PackedMatrix, Tensor | None, torch.dtype], PackedProduct | None]


class SmallBatchKernels(Protocol):
    """Products of a layer for few tokens, each joined with the work before and after it."""

    most_tokens: int

    def suits(self, product: PlainProduct) -> bool:
        """Whether these kernels can compute this product."""

    def project_heads(
        self,
        x_TC: Tensor,
        norm: NormWeight,
        projection: PlainProduct,
        num_heads: int,
        qk_norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> Tensor:
        """A new qkv_TAD: the projections of the normed `x_TC`, then `norm_rotate_store_`."""

    def gate_and_up(self, x_TC: Tensor, norm: NormWeight, projection: PlainProduct) -> Tensor:
        """A new [T, F]: the projections of the normed `x_TC`, then `silu_and_mul`."""

    def add_product_(self, x_TI: Tensor, projection: PlainProduct, sums_TO: Tensor) -> None:
        """Add the product to `sums_TO` in place."""

    def add_experts_(
        self,
        x_TC: Tensor,
        norm: NormWeight,
        router: PlainProduct,
        experts: ExpertWeights,
        per_token: int,
        normalize: bool,
    ) -> None:
        """Add to `x_TC` in place the outputs of the experts that `router`, which has no bias,
        selects for the normed `x_TC`; see Kernels.route.
        """


class Kernels(Protocol):
    """Implemented once per device; `torch_native` is the reference for the others."""

    # Optional: if None, sampler.py, the MoE layer or the linear layers use torch, and layers run
    # small batches as others.
    sample: SampleRows | None
    run_experts: RunExperts | None
    make_product: MakeProduct | None
    make_packed_product: MakePackedProduct | None
    small_batch: SmallBatchKernels | None

    def add_rms_norm_(self, x_TC: Tensor, delta: Tensor | None, w_C: Tensor, eps: float) -> Tensor:
        """Add `delta` to `x_TC` in place; return `x_TC` normalised and scaled by `w_C`.

        delta: [T, C], or what `run_experts` returns, which is summed over N. The result is a new
        tensor, or `delta` overwritten.
        """

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 F] -> a new [T, F]: silu(first half) * second half."""

    def norm_rotate_store_(
        self,
        qkv_TAD: Tensor,
        num_heads: int,
        norm: QKNormWeights | None,
        rope_rows: RopeRows,
        cache: CacheSlots,
    ) -> None:
        """Normalise and rotate queries and keys in place; store keys and values in the cache.

        The A heads are H queries, K keys, K values. See RotaryEmbedding for the rotation.
        """

    def mask_logits_(self, logits_SV: Tensor, samples_G: Tensor, masks_GW: Tensor) -> None:
        """Set to minus infinity the float32 logits that a sample's mask does not allow.

        samples_G: int32 indices into S, on the logits' device. masks_GW: int32, at least V bits per
        row; bit i of word w allows token 32 w + i.
        """

    def penalize_(self, logits_SV: Tensor, counts_RV: Tensor, penalties: PenaltyColumns) -> None:
        """Apply repetition, then frequency and presence penalties, to the samples that have any.

        counts_RV: int16; how often a token was output, -1 if it occurs only in the prompt, else 0.
        """

    def route(self, logits_TE: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
        """The most likely experts of each token: scores [T, N], best first, and experts, int64.

        Scores are the softmax of the logits, in their dtype; normalize: divided by their sum.
        """

    def argmax(self, logits_SV: Tensor) -> Tensor:
        """Index of the first maximum of each row, int64 [S]; of the first NaN if there is one."""
