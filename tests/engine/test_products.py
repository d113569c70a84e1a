"""Products with stored weights, against float64."""

from __future__ import annotations

import pytest
import torch

from minisrv.engine.kernels import compiler
from minisrv.engine.kernels.cpu import CpuKernels, load_cpu_kernels
from minisrv.engine.layers import linear
from minisrv.engine.layers.linear import make_float32_product, make_product
from tests.support.kernels import implementations

# outputs, inputs: parts of a panel of 16, and more than one piece per thread
MATRICES = [(1, 2), (5, 32), (16, 16), (100, 64), (333, 66), (1000, 256), (4000, 128)]
ROWS = [1, 2, 3, 4, 5, 7, 8, 13, 97, 200]
FLOAT32_SUM = 3e-6  # relative to the sum of the magnitudes of the products
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


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), MATRICES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_packed_product_is_that_of_float64(
    kernels: CpuKernels, outputs: int, inputs: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    weight, bias = normal(outputs, inputs), normal(outputs) if with_bias else None
    products = [kernels._make_product(weight, bias, t) for t in (torch.float32, torch.bfloat16)]
    for rows in ROWS:
        x = normal(rows, inputs)
        expected = x.double() @ weight.double().T
        magnitude = x.double().abs() @ weight.double().abs().T
        if bias is not None:
            expected += bias.double()
            magnitude += bias.double().abs()
        assert products[0] is not None
        assert products[1] is not None
        ours, rounded = products[0](x), products[1](x)
        assert ours.dtype is torch.float32
        assert rounded.dtype is torch.bfloat16
        assert ((ours - expected).abs() <= FLOAT32_SUM * magnitude).all()
        assert torch.equal(rounded, ours.bfloat16())


@needs_compiler
@pytest.mark.parametrize(("outputs", "inputs"), MATRICES)
def test_a_row_does_not_depend_on_the_other_rows(
    kernels: CpuKernels, outputs: int, inputs: int
) -> None:
    torch.manual_seed(1)
    product = kernels._make_product(normal(outputs, inputs), None, torch.float32)
    assert product is not None
    x = normal(max(ROWS), inputs)
    one_by_one = torch.cat([product(x[i : i + 1].contiguous()) for i in range(len(x))])
    for rows in ROWS:
        assert torch.equal(product(x[:rows].contiguous()), one_by_one[:rows])


@needs_compiler
def test_infinite_and_undefined_inputs_stay_in_their_row(kernels: CpuKernels) -> None:
    product = kernels._make_product(torch.ones(40, 16).bfloat16(), None, torch.float32)
    assert product is not None
    x = torch.ones(6, 16).bfloat16()
    x[1, 3], x[4, 8] = torch.nan, torch.inf
    out = product(x)
    assert out[1].isnan().all()
    assert out[4].isposinf().all()
    assert (out[[0, 2, 3, 5]] == 16).all()


@needs_compiler
def test_weights_that_cannot_be_packed_are_left_to_torch(kernels: CpuKernels) -> None:
    odd, other = normal(8, 7), torch.randn(8, 6)
    assert kernels._make_product(odd, None, torch.bfloat16) is None
    assert kernels._make_product(other, None, torch.float32) is None
    x = normal(3, 7)
    torch.testing.assert_close(make_product(kernels, odd)(x), x @ odd.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("inputs", [64, 65])
def test_logits_are_summed_and_returned_in_float32(
    dtype: torch.dtype, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_ROWS_IN_FLOAT32", 100)
    torch.manual_seed(2)
    x, weight = torch.randn(5, inputs).to(dtype), torch.randn(250, inputs).to(dtype)
    expected, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    for kernels in implementations(torch.bfloat16):
        logits = make_float32_product(kernels, weight)(x, None)
        assert logits.dtype is torch.float32
        assert ((logits - expected).abs() <= FLOAT32_SUM * magnitude).all()
        given = torch.empty(5, 250)
        assert make_float32_product(kernels, weight)(x, given) is given
        assert torch.equal(given, logits)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layers_product_has_the_dtype_of_its_weights(with_bias: bool) -> None:
    torch.manual_seed(3)
    x, weight, bias = normal(9, 64), normal(48, 64), normal(48) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for kernels in implementations(torch.bfloat16):
        out = make_product(kernels, weight, bias)(x)
        assert out.dtype is torch.bfloat16
        assert ((out - expected).abs() <= BF16 * expected.abs() + 1e-4).all()
