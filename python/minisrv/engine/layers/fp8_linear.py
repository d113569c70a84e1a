"""Products with FP8 matrices; the input is rounded to FP8 in each step.

If both sides have one scale per row, torch's own product is used. For scales per group of columns
there is a Triton kernel, which supports any number of tokens, and matrices that were sharded or
joined inside a block.
"""

# Shapes: T tokens in the step, I inputs, O outputs, G groups of inputs.

from __future__ import annotations

import torch
from torch import Tensor

from minisrv.engine.fp8 import Fp8Matrix, quantize

_LEAST_GROUP = 32  # inputs per FP8 instruction
_ALIGNMENT = 16  # of both dimensions of a matrix, required by torch's product


def can_multiply(matrix: Fp8Matrix) -> bool:
    """Whether there is a kernel for the dtype, shape and groups of this matrix."""
    outputs, inputs = matrix.values_OI.shape
    if matrix.values_OI.dtype is not torch.float8_e4m3fn:
        return False
    if matrix.scales_OG.shape[1] == 1:
        return outputs % _ALIGNMENT == 0 and inputs % _ALIGNMENT == 0
    return matrix.group >= _LEAST_GROUP and matrix.group & (matrix.group - 1) == 0


class Fp8Linear:
    """x_TI -> a new x_TI @ matrix.T + bias_O, in the dtype of x_TI."""

    def __init__(self, matrix: Fp8Matrix, bias_O: Tensor | None = None) -> None:
        assert can_multiply(matrix)
        self._matrix, self._bias = matrix, bias_O
        self._by_rows = matrix.scales_OG.shape[1] == 1
        self._quantize = quantize
        if not self._by_rows or matrix.values_OI.is_cuda:
            from minisrv.engine.kernels import triton_fp8

            self._quantize, self._grouped_product = triton_fp8.quantize, triton_fp8.grouped_product

    def __call__(self, x_TI: Tensor) -> Tensor:
        matrix = self._matrix
        values_TI, scales_TG = self._quantize(x_TI, matrix.group)
        if self._by_rows:
            scales = scales_TG, matrix.scales_OG.t()
            out_TO = torch._scaled_mm(
                values_TI, matrix.values_OI.t(), *scales, out_dtype=x_TI.dtype
            )
        else:
            out_TO = self._grouped_product(values_TI, scales_TG, matrix, x_TI.dtype)
        return out_TO if self._bias is None else out_TO.add_(self._bias)
