"""Rounds activations to FP8, and multiplies matrices that have a scale per group of columns."""

# Shapes: T tokens in the step, I inputs, O outputs, G groups of inputs.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisrv.engine.fp8 import E4M3_MAX, LEAST_MAXIMUM, Fp8Matrix
from minisrv.engine.kernels.triton_dependency import begin, dependent


@triton.jit
def _quantize(
    x,
    values,
    scales,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per token and group."""
    begin(PDL)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    columns = part * GROUP + at
    inside = (at < GROUP) & (columns < INPUTS)
    given = tl.load(x + token * INPUTS + columns, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(given), 0), LEAST) / LIMIT
    rounded = tl.clamp(given / scale, -LIMIT, LIMIT).to(values.dtype.element_ty)
    tl.store(values + token * INPUTS + columns, rounded, inside)
    tl.store(scales + token * tl.num_programs(1) + part, scale)


# The number of tokens varies from step to step; do not compile variants for some of the values.
@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_product(
    x,
    x_scales,
    matrix,
    matrix_scales,
    out,
    num_tokens,
    num_outputs,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program per tile of the output. BLOCK_I divides GROUP, so within a tile of inputs each
    row has one scale, which is applied to the product in float32.
    """
    begin(PDL)
    num_groups: tl.constexpr = (INPUTS + GROUP - 1) // GROUP
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_output, is_token = outputs < num_outputs, tokens < num_tokens
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first in range(0, INPUTS, BLOCK_I):
        columns = first + tl.arange(0, BLOCK_I)
        inside = columns < INPUTS
        x_tile = tl.load(
            x + tokens[:, None] * INPUTS + columns[None, :],
            is_token[:, None] & inside[None, :],
            0.0,
        )
        matrix_tile = tl.load(
            matrix + outputs[None, :] * INPUTS + columns[:, None],
            is_output[None, :] & inside[:, None],
            0.0,
        )
        part = first // GROUP
        x_scale = tl.load(x_scales + tokens * num_groups + part, is_token, 0.0)
        matrix_scale = tl.load(matrix_scales + outputs * num_groups + part, is_output, 0.0)
        total += tl.dot(x_tile, matrix_tile) * x_scale[:, None] * matrix_scale[None, :]
    tl.store(
        out + tokens[:, None] * num_outputs + outputs[None, :],
        total.to(out.dtype.element_ty),
        is_token[:, None] & is_output[None, :],
    )


def quantize(x_TI: Tensor, group: int) -> tuple[Tensor, Tensor]:
    assert x_TI.is_contiguous()
    num_tokens, inputs = x_TI.shape
    num_groups = triton.cdiv(inputs, group)
    values_TI = torch.empty_like(x_TI, dtype=torch.float8_e4m3fn)
    scales_TG = torch.empty(num_tokens, num_groups, dtype=torch.float32, device=x_TI.device)
    block = triton.next_power_of_2(group)
    _quantize[(num_tokens, num_groups)](
        x_TI,
        values_TI,
        scales_TG,
        LIMIT=E4M3_MAX,
        LEAST=LEAST_MAXIMUM,
        INPUTS=inputs,
        GROUP=group,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        **dependent(),
    )
    return values_TI, scales_TG


def grouped_product(
    values_TI: Tensor, scales_TG: Tensor, matrix: Fp8Matrix, dtype: torch.dtype
) -> Tensor:
    """The result of `quantize` times the transposed matrix, in `dtype`; both have the same groups.

    The size of a group is a power of two, at least 32.
    """
    num_tokens, inputs = values_TI.shape
    num_outputs = matrix.values_OI.shape[0]
    out_TO = torch.empty(num_tokens, num_outputs, dtype=dtype, device=values_TI.device)
    block_t, block_o, num_warps = tile(num_tokens)
    grid = (triton.cdiv(num_outputs, block_o), triton.cdiv(num_tokens, block_t))
    _grouped_product[grid](
        values_TI,
        scales_TG,
        matrix.values_OI,
        matrix.scales_OG,
        out_TO,
        num_tokens,
        num_outputs,
        INPUTS=inputs,
        GROUP=matrix.group,
        BLOCK_T=block_t,
        BLOCK_O=block_o,
        BLOCK_I=min(matrix.group, 128),
        num_warps=num_warps,
        num_stages=4,
        **dependent(),
    )
    return out_TO


def tile(num_tokens: int) -> tuple[int, int, int]:
    """Tokens and outputs per program, and its warps. With few tokens, more programs are faster."""
    if num_tokens <= 16:
        return 16, 32, 4
    if num_tokens <= 64:
        return 64, 64, 4
    return 128, 128, 8
