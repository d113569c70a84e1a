"""The start of a layer for at most 16 tokens: the norm joined with the products behind it.

16 rows are the least of a tensor-core instruction; rows that are left out are zeros that are not
read. The input is multiplied by the weight of the norm as it is read; the scale is known only when
all of it has been read, and multiplies the result. Sums are in float32.
"""

# Shapes: T tokens, C hidden size.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TOKENS = 16
ROWS = tl.constexpr(MOST_TOKENS)


@triton.jit
def normed_products(
    x,
    norm,
    first_at,
    second_at,
    is_row,
    is_column,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The normed tokens times two blocks of columns, except the norm's scale; and the mean squares
    of the tokens, from which that scale follows.

    first_at, second_at: pointers [INNER, COLUMNS] to the first inputs of the two blocks.
    is_row [ROWS], is_column [COLUMNS]: others are not read.
    """
    token, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    is_row, is_column = is_row[:, None], is_column[None, :]
    x_at = x + token[:, None] * INPUTS + inner[None, :]
    first = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, INPUTS, INNER):
        is_input = inner < INPUTS - start
        a_mask, b_mask = is_row, is_column
        if INPUTS % INNER != 0:
            a_mask, b_mask = is_row & is_input[None, :], is_input[:, None] & is_column
        a = tl.load(x_at + start, a_mask, 0.0)
        b = tl.load(first_at + start, b_mask, 0.0)
        c = tl.load(second_at + start, b_mask, 0.0)
        weight = tl.load(norm + start + inner, is_input, 0.0)
        wide = a.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        weighted = (wide * weight.to(tl.float32)[None, :]).to(a.dtype)
        first = tl.dot(weighted, b, first, input_precision=PRECISION)
        second = tl.dot(weighted, c, second, input_precision=PRECISION)
    return first, second, squares / INPUTS


def precision(x: Tensor) -> str:
    """Of a product of matrices of this dtype."""
    return "ieee" if x.dtype is torch.float32 else "tf32"
