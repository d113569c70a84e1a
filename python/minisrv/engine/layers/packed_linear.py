"""Products with packed matrices: those of the kernels, or the reference in torch."""

# Shapes: T tokens in the step, O outputs and I inputs of a matrix, N of its rows.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.kernels.base import Kernels, PackedProduct, Product
from minisrv.engine.packed import PackedMatrix


class PackedLinear:
    """A PackedProduct in torch: multiplies the dequantized weights in float32."""

    def __init__(self, matrix: PackedMatrix, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        self._matrix, self._dtype = matrix, dtype
        self._bias = None if bias_O is None else bias_O.float()

    def __call__(self, x_TI: Tensor) -> Tensor:
        x_TI = x_TI.float()
        blocks = [F.linear(x_TI, part.dequantized()) for part in self._matrix.row_blocks()]
        out_TO = blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)
        return (out_TO if self._bias is None else out_TO.add_(self._bias)).to(self._dtype)

    def rows(self, ids_N: Tensor, dtype: torch.dtype) -> Tensor:
        return self._matrix.rows(ids_N).to(dtype)


def make_packed_product(
    kernels: Kernels, matrix: PackedMatrix, bias_O: Tensor | None, dtype: torch.dtype
) -> PackedProduct:
    """The product with this matrix; its results are in `dtype`."""
    if kernels.make_packed_product is not None:
        product = kernels.make_packed_product(matrix, bias_O, dtype)
        if product is not None:
            return product
    return PackedLinear(matrix, bias_O, dtype)


class SideBySide:
    """x_TI -> the outputs of several products next to each other."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products

    def __call__(self, x_TI: Tensor) -> Tensor:
        return torch.cat([product(x_TI) for product in self.products], -1)
