"""Matrix products with stored weights.

On a CPU bfloat16 weights are packed: for oneDNN if the CPU has bfloat16 instructions, which makes a
decode step 1.4 to 1.8 times faster than `F.linear` on the plain matrix, and otherwise for the
kernels' own product, which is several times faster than torch's without these instructions.
"""

# Shapes: T tokens in the step, I inputs, O outputs.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.fp8 import Fp8Matrix, join
from minisrv.engine.kernels.base import (
    Float32Product,
    Kernels,
    PlainProduct,
    Product,
    SmallBatchKernels,
)
from minisrv.engine.layers.fp8_linear import Fp8Linear, can_multiply
from minisrv.engine.layers.packed_linear import SideBySide, make_packed_product
from minisrv.engine.packed import PackedMatrix
from minisrv.engine.packed import join as join_packed
from minisrv.engine.parallel.shard import Shard, Sharding
from minisrv.engine.weights import Weights

_ROWS_IN_FLOAT32 = 4096  # of a head, converted together


def make_product(kernels: Kernels, weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
    """The product with these weights, in their dtype."""
    if _onednn_multiplies(weight_OI):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
        multiply = torch.ops.mkldnn._linear_pointwise.default
        return lambda x_TI: multiply(x_TI, packed, bias_O, "none", [], "")
    if kernels.make_product is not None:
        product = kernels.make_product(weight_OI, bias_O, weight_OI.dtype)
        if product is not None:
            return product
    return PlainProduct(weight_OI, bias_O)


def make_float32_product(kernels: Kernels, weight_OI: Tensor) -> Float32Product:
    """The product with these weights of any dtype, summed and returned in float32."""
    if kernels.make_product is not None:
        product = kernels.make_product(weight_OI, None, torch.float32)
        if product is not None:
            return as_float32_product(product)
    if weight_OI.dtype is torch.float32:
        return lambda x_TI, out_TO: torch.mm(x_TI, weight_OI.t(), out=out_TO)
    if weight_OI.is_cuda:
        return lambda x_TI, out_TO: torch.mm(
            x_TI, weight_OI.t(), out_dtype=torch.float32, out=out_TO
        )
    parts = torch.split(weight_OI, _ROWS_IN_FLOAT32)
    return as_float32_product(
        lambda x_TI: torch.cat([F.linear(x_TI.float(), part.float()) for part in parts], -1)
    )


def as_float32_product(product: Product) -> Float32Product:
    """Of one whose results are in float32."""
    return partial(_store, product)


def _store(product: Product, x_TI: Tensor, out_TO: Tensor | None) -> Tensor:
    return product(x_TI) if out_TO is None else out_TO.copy_(product(x_TI))


def _onednn_multiplies(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@dataclass(frozen=True, slots=True)
class Projection:
    """One matrix of a checkpoint: `name` without `.weight`, its outputs, and the rows to load."""

    name: str
    outputs: int
    shard: Shard | None = None


def load_linear(
    weights: Weights,
    kernels: Kernels,
    projections: Sequence[Projection],
    inputs: int,
    bias: bool = False,
) -> Product:
    """Several projections of the same input as one matrix, their outputs side by side."""
    parts = [
        weights.load_matrix(f"{p.name}.weight", (p.outputs, inputs), p.shard) for p in projections
    ]
    bias_O = None
    if bias:
        biases = [weights.load_tensor(f"{p.name}.bias", (p.outputs,), p.shard) for p in projections]
        bias_O = torch.cat(biases)
    return _linear(kernels, parts, bias_O, weights.dtype)


def load_row_parallel_linear(
    weights: Weights,
    kernels: Kernels,
    name: str,
    inputs: int,
    outputs: int,
    bias: bool,
    sharding: Sharding,
) -> Product:
    """A projection of this rank's shard of the inputs; all_reduce of the results is the whole."""
    part = weights.load_matrix(f"{name}.weight", (outputs, inputs), sharding.even_shard(inputs, 1))
    bias_O = weights.load_tensor(f"{name}.bias", (outputs,)) if bias else None
    return _linear(kernels, [part], bias_O if sharding.rank == 0 else None, weights.dtype)


def has_joined(product: Product, kernels: SmallBatchKernels) -> TypeGuard[PlainProduct]:
    """Whether these kernels can compute the product."""
    return isinstance(product, PlainProduct) and kernels.suits(product)


def _linear(
    kernels: Kernels,
    parts: Sequence[Tensor | Fp8Matrix | PackedMatrix],
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Product:
    """The parts as one matrix, in FP8 if all of them are and there is a kernel for it.

    If there are packed ones, each run of parts of one format is a product of its own.
    """
    if any(isinstance(part, PackedMatrix) for part in parts):
        products = list(_products_of_runs(kernels, parts, bias_O, dtype))
        return products[0] if len(products) == 1 else SideBySide(products)
    stored = [part for part in parts if isinstance(part, Fp8Matrix)]
    kinds = {(part.group, part.values_OI.dtype) for part in stored}
    if len(stored) == len(parts) and len(kinds) == 1:
        matrix = join(stored)
        if can_multiply(matrix):
            return Fp8Linear(matrix, bias_O)
    plain = [part if isinstance(part, Tensor) else part.dequantized().to(dtype) for part in parts]
    return make_product(kernels, plain[0] if len(plain) == 1 else torch.cat(plain), bias_O)


def _products_of_runs(
    kernels: Kernels,
    parts: Sequence[Tensor | Fp8Matrix | PackedMatrix],
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[Product]:
    first = 0
    for _, run in groupby(parts, lambda x: isinstance(x, PackedMatrix) and x.format):
        same = list(run)
        packed = [part for part in same if isinstance(part, PackedMatrix)]
        outputs = sum(_num_outputs(part) for part in same)
        bias = None if bias_O is None else bias_O[first : first + outputs]
        if packed:
            yield make_packed_product(kernels, join_packed(packed), bias, dtype)
        else:
            yield _linear(kernels, same, bias, dtype)
        first += outputs


def _num_outputs(part: Tensor | Fp8Matrix | PackedMatrix) -> int:
    return part.values_OI.shape[0] if isinstance(part, Fp8Matrix) else part.shape[0]
