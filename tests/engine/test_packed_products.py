"""Products with packed matrices, against a model of their rounding in float64."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from minisrv.engine.kernels import compiler
from minisrv.engine.kernels.base import PackedProduct
from minisrv.engine.kernels.cpu import CpuKernels, load_cpu_kernels
from minisrv.engine.kernels.packed import PanelProduct, load_packed_library
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.layers.packed_linear import PackedLinear, make_packed_product
from minisrv.engine.packed import PackedMatrix, join, round_int4, round_int8, shard
from minisrv.engine.parallel.shard import Shard
from tests.engine.test_packed import NAMES, read

ROWS = [*range(1, 41), 95, 97, 200]
SUM = 2e-6  # relative to the sum of the magnitudes of the products
BF16 = 2**-8

needs_compiler = pytest.mark.skipif(
    compiler.find_compiler() is None, reason="there is no C++ compiler here"
)


@pytest.fixture
def kernels() -> CpuKernels:
    loaded = load_cpu_kernels(torch.bfloat16)
    assert loaded is not None
    loaded.num_threads = 2
    return loaded


def product(
    kernels: CpuKernels,
    matrix: PackedMatrix,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> PackedProduct:
    made = kernels._make_packed_product(matrix, bias, dtype)
    assert made is not None
    return made


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The inputs as the kernels take them, in float64.

    The four numbers of greatest magnitude of a row are kept, the first ones of equal magnitudes. Of
    the others, each 32 become the nearest multiples of 1 / 127 of the greatest.
    """
    order = x.float().abs().sort(dim=1, descending=True, stable=True).indices
    is_outlier = torch.zeros_like(x, dtype=torch.bool).scatter(1, order[:, :4], value=True)
    groups = torch.where(is_outlier, 0, x.float()).unflatten(1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0.0)
    others = ((groups * inverse).round().double() * (most / 127).double()).flatten(1)
    return torch.where(is_outlier, x.double(), others)


def inputs(rows: int, columns: int) -> torch.Tensor:
    """Normal, with groups of very different sizes, and one of zeros."""
    x = torch.randn(rows, columns) * torch.rand(rows, columns // 32).exp().repeat_interleave(32, 1)
    x[0, :32] = 0
    return x.bfloat16()


def check(made: PackedProduct, matrix: PackedMatrix, x: torch.Tensor) -> None:
    weights, x_rounded = matrix.dequantized().double(), rounded(x)
    expected, magnitude = x_rounded @ weights.T, x_rounded.abs() @ weights.abs().T
    if matrix.offsets is not None:  # the parts of a difference are larger than it
        offsets = torch.cat([matrix.dequantized().double().abs(), weights.abs()], 1).amax()
        magnitude += x_rounded.abs().sum(1, keepdim=True) * offsets
    assert ((made(x) - expected).abs() <= SUM * magnitude).all()


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outputs", [1, 37, 64])
def test_products_are_those_of_the_rounded_inputs(
    kernels: CpuKernels, name: str, outputs: int
) -> None:
    torch.manual_seed(0)
    matrix = read(name, outputs, 512)
    made = product(kernels, matrix)
    x = inputs(max(ROWS), 512)
    for rows in ROWS:
        check(made, matrix, x[:rows].contiguous())


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_with_any_others_and_any_threads(kernels: CpuKernels, name: str) -> None:
    torch.manual_seed(1)
    made = product(kernels, read(name, 200, 1024))
    x = inputs(max(ROWS), 1024)
    kernels.num_threads = 1
    one_by_one = torch.cat([made(x[i : i + 1].contiguous()) for i in range(len(x))])
    for threads in (1, 2, 3):
        kernels.num_threads = threads
        for rows in ROWS:
            assert torch.equal(made(x[:rows].contiguous()), one_by_one[:rows])


@needs_compiler
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_greatest_sums_do_not_overflow(kernels: CpuKernels, sign: int, rows: int) -> None:
    for name in NAMES:
        matrix = read(name, 32, 512)
        if matrix.bits == 4:
            matrix.values.fill_(255 if matrix.group == 32 or sign > 0 else 0)
        else:
            lowest, highest = (-128, 127) if name == "Q8_0" else (-32, 31)
            matrix.values.fill_(highest if matrix.offsets is not None or sign > 0 else lowest)
        check(product(kernels, matrix), matrix, torch.full((rows, 512), float(sign)).bfloat16())


@needs_compiler
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("columns", [32, 96, 128, 256])
def test_the_product_of_a_shard(kernels: CpuKernels, name: str, columns: int) -> None:
    torch.manual_seed(2)
    matrix = shard(read(name, 20, 512), Shard(1, columns, columns))
    made = product(kernels, matrix)
    for rows in (1, 3, 17):
        check(made, matrix, inputs(rows, columns))


@needs_compiler
@pytest.mark.parametrize("round_weights", [round_int8, round_int4])
def test_products_of_rounded_weights(kernels: CpuKernels, round_weights: object) -> None:
    assert callable(round_weights)
    torch.manual_seed(3)
    matrix = round_weights(torch.randn(100, 96).bfloat16())
    made = product(kernels, matrix)
    for rows in (1, 5, 33):
        check(made, matrix, inputs(rows, 96))


@needs_compiler
def test_types_of_inputs_and_results_and_the_bias(kernels: CpuKernels) -> None:
    torch.manual_seed(4)
    matrix, x, bias = read("Q8_0", 37, 256), inputs(5, 256), torch.randn(37).bfloat16()
    ours = product(kernels, matrix)(x)
    assert ours.dtype is torch.float32
    assert torch.equal(product(kernels, matrix)(x.float()), ours)
    with_bias = product(kernels, matrix, bias)(x)
    assert torch.equal(with_bias, ours + bias.float())
    as_bf16 = product(kernels, matrix, bias, torch.bfloat16)(x)
    assert as_bf16.dtype is torch.bfloat16
    assert torch.equal(as_bf16, with_bias.bfloat16())


@needs_compiler
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_infinite_and_undefined_inputs_stay_in_their_row(kernels: CpuKernels, name: str) -> None:
    made = product(kernels, read(name, 40, 256))
    x = torch.ones(6, 256).bfloat16()
    plain = made(x)
    x[1, 3], x[4, 200] = torch.nan, torch.inf
    out = made(x)
    assert not out[[1, 4]].isfinite().any()
    assert torch.equal(out[[0, 2, 3, 5]], plain[[0, 2, 3, 5]])


@needs_compiler
@pytest.mark.parametrize("largest", [0.0, 1e-38, 3e38])
def test_very_small_and_large_inputs(kernels: CpuKernels, largest: float) -> None:
    matrix = PackedMatrix(8, 32, torch.ones(16, 32, dtype=torch.int8), torch.ones(16, 1).half())
    x = torch.zeros(2, 32)
    x[:, 3] = largest
    out = product(kernels, matrix)(x)
    assert ((out - largest).abs() <= max(1e-36, 1e-6 * largest)).all()


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_looked_up_in_the_panels(kernels: CpuKernels, name: str) -> None:
    matrix = read(name, 37, 768)
    made, ids = product(kernels, matrix), torch.tensor([36, 0, 17, 17, 5])
    expected = matrix.rows(ids)
    ours = made.rows(ids, torch.float32)
    slack = 0.0 if matrix.offsets is None else 1e-6 * float(expected.abs().max())
    assert ((ours - expected).abs() <= slack).all()
    assert torch.equal(made.rows(ids, torch.bfloat16), ours.bfloat16())
    assert made.rows(ids[:0], torch.float32).shape == (0, 768)
    assert made(torch.empty(0, 768)).shape == (0, 37)


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_the_panels_take_the_bytes_that_are_counted(kernels: CpuKernels, name: str) -> None:
    made = product(kernels, read(name, 48, 512))
    assert made._panels.numel() == read(name, 48, 512).num_bytes  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_multiplies_the_dequantized_weights(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisrv.engine.packed._BLOCK", 5000)
    torch.manual_seed(5)
    matrix, bias, x = read(name, 50, 512), torch.randn(50).to(dtype), torch.randn(9, 512).to(dtype)
    made = make_packed_product(TorchKernels(), matrix, bias, dtype)
    assert isinstance(made, PackedLinear)
    weights = matrix.dequantized().double()
    expected = x.double() @ weights.T + bias.double()
    magnitude = x.double().abs() @ weights.abs().T + 1
    assert made(x).dtype is dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: BF16, torch.float16: 2**-11}[dtype]
    if dtype is not torch.float16 or expected.abs().max() < 65504:
        error = (made(x) - expected).abs()
        assert (error <= SUM * magnitude + rounding * expected.abs()).all()
    ids = torch.tensor([3, 3, 49])
    assert torch.equal(made.rows(ids, dtype), matrix.dequantized()[ids].to(dtype))


@needs_compiler
def test_joined_matrices_have_the_outputs_of_each(kernels: CpuKernels) -> None:
    parts = [read("Q4_K", outputs, 512, seed) for seed, outputs in enumerate((24, 7, 33))]
    x = inputs(6, 512)
    expected = torch.cat([product(kernels, part)(x) for part in parts], 1)
    assert torch.equal(product(kernels, join(parts))(x), expected)


# A model of the instructions, by bits of the vectors; a call, which compiles sooner.
EMULATION = """
#include <immintrin.h>
#define EMULATE(BITS)                                                                          \\
  __attribute__((noinline)) static __m##BITS##i emulated##BITS(                                \\
      __m##BITS##i sum, __m##BITS##i w, __m##BITS##i x) {                                      \\
    typedef int V __attribute__((vector_size(BITS / 8)));                                      \\
    V total = (V)sum;                                                                          \\
    for (int shift = 0; shift < 32; shift += 8)                                                \\
      total += ((V)w >> shift & 255) * ((V)x << (24 - shift) >> 24);                           \\
    return (__m##BITS##i)total;                                                                \\
  }
EMULATE(256)
EMULATE(512)
"""
PATHS = {
    "portable": "",
    "avx-vnni": "#define __AVXVNNI__ 1\n#define _mm256_dpbusd_avx_epi32 emulated256\n",
    "avx512-vnni": "#define __AVX512VNNI__ 1\n#define _mm512_dpbusd_epi32 emulated512\n",
}


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="for another processor")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.timeout(600)  # most of it for the compiler, which gets 300 s
def test_the_paths_for_other_processors(
    kernels: CpuKernels, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, original = tmp_path / "paths.cpp", Path(compiler.__file__).with_name("packed.cpp")
    head = EMULATION + PATHS[path] if PATHS[path] else ""
    source.write_text(f'{head}#include "{original}"\n')
    flags = compiler._FLAGS.replace("-O3", "-O0")  # which compiles sooner
    if path == "portable":
        flags = flags.replace("native", "x86-64")
    monkeypatch.setattr(compiler, "_FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = load_packed_library(source)
    assert library is not None
    torch.manual_seed(6)
    for name in NAMES:
        matrix = read(name, 37, 512)
        made = PanelProduct(library, matrix, None, torch.float32, lambda: 2)
        for rows in (1, 2, 3, 5, 8, 9, 40):
            check(made, matrix, inputs(rows, 512))
        ids = torch.tensor([5])
        assert torch.allclose(made.rows(ids, torch.float32), matrix.rows(ids))
