"""Packed matrices: equal to the `gguf` package bit for bit, rounded, joined and sharded."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from minisrv.engine import gguf_packed, packed
from minisrv.engine.gguf_packed import KINDS, from_gguf
from minisrv.engine.kernels.compiler import find_compiler
from minisrv.engine.packed import PackedMatrix, can_round, join, round_int4, round_int8, shard
from minisrv.engine.parallel.shard import Shard
from minisrv.errors import ConfigError

Kind = GGMLQuantizationType
NAMES = sorted(kind.name for kind in KINDS)
# Where a block has its float16 scales.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
BITS_PER_WEIGHT = {
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 8.5,
    "Q5_1": 9.0,
    "Q8_0": 8.5,
    "Q2_K": 4.875,
    "Q3_K": 4.5625,
    "Q4_K": 4.5,
    "Q5_K": 8.5,
    "Q6_K": 8.5625,
}


def random_blocks(name: str, outputs: int, inputs: int, seed: int = 0) -> NDArray[np.uint8]:
    """Every byte at random, except that the float16 scales are finite."""
    rng = np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[Kind[name]]
    blocks = rng.integers(0, 256, (outputs, inputs // block, size), np.uint8)
    for at in HALVES[name]:
        scales = rng.normal(0, 1, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(outputs, -1)


def read(name: str, outputs: int, inputs: int, seed: int = 0) -> PackedMatrix:
    return from_gguf(Kind[name], random_blocks(name, outputs, inputs, seed), (outputs, inputs))


def same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return ours.shape == expected.shape and torch.equal(
        ours.contiguous().view(torch.int32), expected.contiguous().view(torch.int32)
    )


def test_every_type_is_tested() -> None:
    assert set(NAMES) == HALVES.keys() == BITS_PER_WEIGHT.keys()


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_packed, "_load_library", lambda: None)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_gguf_bit_for_bit(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_packed, "_BLOCK_BYTES", 5000)
    if not compiled:
        without_compiler(monkeypatch)
    raw = random_blocks(name, 37, 768)
    raw.flags.writeable = False
    expected = torch.from_numpy(gguf.quants.dequantize(raw, Kind[name]))
    matrix = from_gguf(Kind[name], raw, (37, 768))
    assert matrix.shape == (37, 768)
    assert same_bits(matrix.dequantized(), expected)
    assert same_bits(from_gguf(Kind[name], raw.reshape(-1), (37, 768)).dequantized(), expected)
    ids = torch.tensor([36, 0, 5, 5])
    assert same_bits(matrix.rows(ids), expected[ids])


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_is_the_same_without_a_compiler(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = read(name, 21, 512)
    without_compiler(monkeypatch)
    plain = read(name, 21, 512)
    assert compiled.format == plain.format
    assert compiled.tensors().keys() == plain.tensors().keys()
    for part, tensor in plain.tensors().items():
        assert torch.equal(compiled.tensors()[part].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_the_compiled_types_are_converted_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_packed, "convert", None)
    for kind in gguf_packed._COMPILED:
        assert read(kind.name, 5, 512).shape == (5, 512)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_as_compact_as_in_the_file(name: str) -> None:
    assert read(name, 16, 512).num_bytes * 8 == 16 * 512 * BITS_PER_WEIGHT[name]


@pytest.mark.parametrize("name", NAMES)
def test_values_keep_to_what_the_kernels_rely_on(name: str) -> None:
    matrix = read(name, 16, 1024)
    if matrix.offsets is None:
        return
    assert matrix.zero == 0
    assert matrix.bits == 4 or matrix.values.min() >= 0
    for integers in (matrix.scales, matrix.offsets):
        if integers.dtype is torch.int8:
            assert 0 <= integers.min() <= integers.max() <= 63


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_rows_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_BLOCK", 3000)
    matrix = read(name, 20, 512)
    blocks = list(matrix.row_blocks())
    assert len(blocks) == 4
    assert same_bits(torch.cat([part.dequantized() for part in blocks]), matrix.dequantized())


@pytest.mark.parametrize("name", NAMES)
def test_joined_matrices_lie_below_each_other(name: str) -> None:
    parts = [read(name, outputs, 512, seed) for seed, outputs in enumerate((5, 16, 3))]
    expected = torch.cat([part.dequantized() for part in parts])
    assert same_bits(join(parts).dequantized(), expected)
    assert join(parts[:1]) is parts[0]


def test_only_matrices_of_one_format_are_joined() -> None:
    formats = {read(name, 16, 512).format for name in NAMES}
    assert len(formats) == len(NAMES) - 1  # Q5_0 is a Q8_0 with small values
    assert read("Q8_0", 16, 512).format != read("Q8_0", 16, 256).format


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_has_its_rows_or_columns(name: str) -> None:
    matrix = read(name, 24, 1024)
    whole = matrix.dequantized()
    for part in (Shard(0, 5, 13), *(Shard(1, i * n, n) for n in (32, 256, 96) for i in (0, 1, 3))):
        expected = whole.narrow(part.dim, part.start, part.length)
        assert same_bits(shard(matrix, part).dequantized(), expected)


def test_a_shard_of_part_of_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"columns 24 to 48 .* cannot be divided; lower --tp"):
        shard(read("Q8_0", 4, 512), Shard(1, 24, 24))
    with pytest.raises(ConfigError, match="cannot be divided"):
        shard(read("Q4_0", 4, 512), Shard(1, 16, 48))


def test_rounding_to_8_bits_is_to_the_nearest_of_255(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_BLOCK", 1000)
    torch.manual_seed(0)
    weight = torch.randn(50, 96).bfloat16()
    matrix = round_int8(weight)
    assert matrix.num_bytes == 50 * 3 * (32 + 2)
    scales = matrix.scales.float().repeat_interleave(32, 1)
    assert ((matrix.dequantized() - weight).abs() <= scales * 0.501 + 1e-6).all()
    largest = weight.float().abs().view(50, 3, 32).amax(-1)
    assert torch.equal(matrix.scales, (largest / 127).half())


def test_rounding_to_4_bits_errs_less_than_ggufs_q4_0() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256).bfloat16().float()
    matrix = round_int4(weight.bfloat16())
    assert matrix.num_bytes == 64 * 8 * (16 + 2)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), Kind.Q4_0), Kind.Q4_0)
    ours = (matrix.dequantized() - weight).square().sum()
    assert ours < 0.98 * (torch.from_numpy(theirs) - weight).square().sum()


@pytest.mark.parametrize("rounded", [round_int8, round_int4])
def test_numbers_on_the_grid_are_kept(rounded: object) -> None:
    """And groups of zeros stay zeros."""
    assert callable(rounded)
    values = torch.arange(-8.0, 8).repeat(2, 4)
    values[1, :32] = 0
    if rounded is round_int8:
        values[:, 5] = 127
    weight = values * 2.0**-7
    assert torch.equal(rounded(weight).dequantized()[:, :32], weight[:, :32])
    assert torch.isfinite(rounded(weight).dequantized()).all()


def test_only_whole_groups_are_rounded() -> None:
    assert can_round(torch.zeros(3, 64))
    assert not can_round(torch.zeros(3, 48))
    assert not can_round(torch.zeros(64))
