"""Matrices with 4 or 8 bits per weight and a scale for each group of inputs.

They hold what GGUF files and `--quantization` have: every type of `gguf_packed.py` is represented
without a change to any number, because scales are kept as the file has them. K types have integer
scales, which are multiplied by a super scale that several groups share.
"""

# Shapes: O outputs and I inputs of a matrix, G groups of inputs, S groups of groups.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minisrv.engine.parallel.shard import Shard
from minisrv.errors import ConfigError

NIBBLES = 32  # inputs whose 4-bit values share 16 bytes
_ROUNDED_GROUP = 32
_BLOCK = 1 << 18  # weights that are converted together
_SIX_BITS = 6


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """The number in row o and column i is `scale * (value - zero) + offset` of its group.

    values: int8 [O, I], or with 4 bits uint8 [O, I / 2]: of each 32 inputs, byte j holds input j in
    its low half and input j + 16 in the high one. scales, offsets: float16 [O, G], or int8 [O, G]
    to be multiplied by float16 [O, S]; as in the files, integers beside offsets are 0 to 63. With
    offsets, values are not negative and `zero` is 0; with 8 bits, too.
    """

    bits: int
    group: int  # inputs: 16 or 32
    values: Tensor
    scales: Tensor
    super_scales: Tensor | None = None
    offsets: Tensor | None = None
    super_offsets: Tensor | None = None
    zero: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.values.shape[0], self.values.shape[1] * 8 // self.bits

    @property
    def groups_per_super(self) -> int:
        return (
            1 if self.super_scales is None else self.scales.shape[1] // self.super_scales.shape[1]
        )

    @property
    def format(self) -> tuple[object, ...]:
        """Equal for matrices that `join` can stack."""
        kinds = self.scales.dtype, self.offsets is None, self.groups_per_super
        return self.bits, self.group, self.zero, self.shape[1], kinds

    @property
    def num_bytes(self) -> int:
        """As the kernels hold it: integer scales beside offsets take 6 bits."""
        num_bytes = sum(tensor.nbytes for tensor in self.tensors().values())
        if self.super_scales is not None and self.offsets is not None:
            num_bytes -= (self.scales.nbytes + self.offsets.nbytes) * (8 - _SIX_BITS) // 8
        return num_bytes

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that it has, by name."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def dequantized(self) -> Tensor:
        """The matrix in float32."""
        outputs, inputs = self.shape
        grouped = self._integers().float().view(outputs, -1, self.group)
        grouped.mul_(_product(self.scales, self.super_scales).unsqueeze(-1))
        if self.offsets is not None:
            grouped.add_(_product(self.offsets, self.super_offsets).unsqueeze(-1))
        return grouped.view(outputs, inputs)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` in float32."""
        return self._changed(lambda tensor: tensor.index_select(0, ids)).dequantized()

    def row_blocks(self) -> Iterator[PackedMatrix]:
        """The matrix as views of some rows, each small enough to be copied in float32."""
        outputs, inputs = self.shape
        step = max(1, _BLOCK // inputs)
        for start in range(0, outputs, step):
            yield self._narrowed(start, min(step, outputs - start))

    def _integers(self) -> Tensor:
        if self.bits == 8:
            return self.values
        halves = self.values.view(self.values.shape[0], -1, NIBBLES // 2)
        values = torch.cat((halves & 15, halves >> 4), -1).view(torch.int8)
        return values.sub_(self.zero).flatten(1)

    def _narrowed(self, start: int, length: int) -> PackedMatrix:
        return self._changed(lambda tensor: tensor.narrow(0, start, length))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> PackedMatrix:
        changed: dict[str, Any] = {name: change(x) for name, x in self.tensors().items()}
        return replace(self, **changed)


def join(parts: Sequence[PackedMatrix]) -> PackedMatrix:
    """Stack matrices of the same format, one below the other."""
    if len(parts) == 1:
        return parts[0]
    assert len({part.format for part in parts}) == 1
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].tensors()
    }
    return replace(parts[0], **joined)


def empty_like(matrix: PackedMatrix, outputs: int) -> PackedMatrix:
    """A matrix of the same format with `outputs` rows that are not initialized."""
    return matrix._changed(lambda tensor: tensor.new_empty(outputs, *tensor.shape[1:]))


def convert(blocks: Sequence[Tensor], to_packed: Callable[[Tensor], PackedMatrix]) -> PackedMatrix:
    """The packed forms of blocks of rows, one below the other, made by torch's number of threads.

    Each thread works on blocks of its own: threads that share the operations of one would wait for
    each other some twenty times per block, which takes long beside busy processes.
    """
    first = to_packed(blocks[0])
    if len(blocks) == 1:
        return first
    ends = list(accumulate(block.shape[0] for block in blocks))
    whole = empty_like(first, ends[-1])
    inference = torch.is_inference_mode_enabled()

    def store(part: PackedMatrix, end: int) -> None:
        to = whole._narrowed(end - part.shape[0], part.shape[0]).tensors()
        for name, tensor in part.tensors().items():
            to[name].copy_(tensor)

    @torch.inference_mode(inference)  # which is a mode of each thread
    def convert_block(i: int) -> None:
        store(to_packed(blocks[i]), ends[i])

    store(first, ends[0])
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        list(pool.map(convert_block, range(1, len(blocks))))
    torch.set_num_threads(num_threads)
    return whole


def shard(matrix: PackedMatrix, part: Shard) -> PackedMatrix:
    """A copy of some rows, or of some columns. Raises ConfigError for a part of a group."""
    if part.dim == 0:
        return matrix._narrowed(part.start, part.length)._changed(torch.clone)
    least = max(matrix.group, NIBBLES if matrix.bits == 4 else 1)
    if part.start % least or part.length % least:
        raise ConfigError(
            f"a rank would hold the columns {part.start} to {part.start + part.length} of a "
            f"quantized matrix, whose {least} columns with a common scale cannot be divided; "
            "lower --tp"
        )
    first, count = part.start // matrix.group, part.length // matrix.group
    # A shard that begins inside a super group gets smaller ones.
    together = math.gcd(matrix.groups_per_super, first, count)
    repeats = matrix.groups_per_super // together

    def columns(tensor: Tensor | None, start: int, length: int) -> Tensor | None:
        return None if tensor is None else tensor.narrow(1, start, length).clone()

    def super_columns(tensor: Tensor | None) -> Tensor | None:
        repeated = None if tensor is None else tensor.repeat_interleave(repeats, 1)
        return columns(repeated, first // together, count // together)

    values = columns(matrix.values, *(n * matrix.bits // 8 for n in (part.start, part.length)))
    scales = columns(matrix.scales, first, count)
    assert values is not None
    assert scales is not None
    return PackedMatrix(
        matrix.bits,
        matrix.group,
        values,
        scales,
        super_columns(matrix.super_scales),
        columns(matrix.offsets, first, count),
        super_columns(matrix.super_offsets),
        matrix.zero,
    )


def round_int8(weight_OI: Tensor) -> PackedMatrix:
    """8 bits per weight: the greatest magnitude of 32 inputs becomes 127."""
    return convert(_row_blocks(weight_OI), _rounded_int8)


def round_int4(weight_OI: Tensor) -> PackedMatrix:
    """4 bits per weight: of 32 inputs, the one with the greatest magnitude becomes -8.

    Then the scale is the one with the least squared error for these values.
    """
    return convert(_row_blocks(weight_OI), _rounded_int4)


def can_round(weight_OI: Tensor) -> bool:
    """Whether the inputs are whole groups."""
    return weight_OI.dim() == 2 and weight_OI.shape[1] % _ROUNDED_GROUP == 0


def _rounded_int8(weight_OI: Tensor) -> PackedMatrix:
    grouped = _grouped(weight_OI)
    low, high = torch.aminmax(grouped, dim=-1)
    scales = (torch.maximum(high, -low) / 127).half()
    values = (grouped * _inverse(scales)).round_().clamp_(-127, 127).to(torch.int8)
    return PackedMatrix(8, _ROUNDED_GROUP, values.flatten(1), scales)


def _rounded_int4(weight_OI: Tensor) -> PackedMatrix:
    grouped = _grouped(weight_OI)
    low, high = torch.aminmax(grouped, dim=-1)
    largest = torch.where(high > -low, high, low)
    values = (grouped * _inverse((largest / -8).half())).round_().clamp_(-8, 7)
    squares = values.square().sum(-1).clamp_(min=1)
    scales = ((values * grouped).sum(-1) / squares).half()
    nibbles = values.add_(8).to(torch.uint8)
    first, second = torch.split(nibbles, NIBBLES // 2, -1)
    return PackedMatrix(4, _ROUNDED_GROUP, (first | second << 4).flatten(1), scales, zero=8)


def _row_blocks(weight_OI: Tensor) -> Sequence[Tensor]:
    return torch.split(weight_OI, max(1, _BLOCK // weight_OI.shape[1]))


def _grouped(weight_OI: Tensor) -> Tensor:
    return weight_OI.float().view(weight_OI.shape[0], -1, _ROUNDED_GROUP)


def _inverse(scales_OG: Tensor) -> Tensor:
    """For each group, 1 / scale; 0 for a group of zeros."""
    scales = scales_OG.float().unsqueeze(-1)
    return torch.where(scales == 0, 0.0, 1 / scales)


def _product(factors_OG: Tensor, super_factors_OS: Tensor | None) -> Tensor:
    """In float32 [O, G]."""
    if super_factors_OS is None:
        return factors_OG.float()
    per_super = factors_OG.shape[1] // super_factors_OS.shape[1]
    return factors_OG.float() * super_factors_OS.float().repeat_interleave(per_super, 1)
