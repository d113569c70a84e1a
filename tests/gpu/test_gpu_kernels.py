"""Each small operator of a GPU against the same in float64 on the same 16-bit inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisrv.engine.kernels.base import CacheSlots, Kernels, QKNormWeights
from minisrv.engine.kernels.torch_native import TorchKernels

DEVICE = torch.device("cuda")
REFERENCE = TorchKernels()


@pytest.fixture
def kernels() -> Kernels:
    from minisrv.engine.kernels.cuda import CudaKernels

    torch.manual_seed(0)
    return CudaKernels(joined=False)


def half(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("shape", [(1, 1024), (256, 4096), (3000, 5120)])
def test_norm(kernels: Kernels, shape: tuple[int, int], with_delta: bool) -> None:
    x, weight = half(*shape), half(shape[1])
    delta = half(*shape) if with_delta else None
    reference = x.double()
    expected = REFERENCE.add_rms_norm_(
        reference, None if delta is None else delta.double(), weight.double(), 1e-6
    )
    assert_close(kernels.add_rms_norm_(x, delta, weight, 1e-6), expected)
    assert_close(x, reference)


@pytest.mark.parametrize("shape", [(1, 6144), (256, 24576), (3000, 34816)])
def test_silu(kernels: Kernels, shape: tuple[int, int]) -> None:
    gate_up = half(*shape) * 4
    assert_close(kernels.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up.double()))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("num_heads", [2, 10, 32])
def test_norm_rotate_store(
    kernels: Kernels, num_heads: int, head_dim: int, with_norm: bool
) -> None:
    num_tokens, num_slots = 77, 500
    qkv, rope = half(num_tokens, num_heads + 4, head_dim), half(2, num_tokens, 1, head_dim)
    weights = half(2, head_dim)
    slots = torch.randperm(num_slots, device=DEVICE)[:num_tokens]
    results = []
    for function, dtype in (
        (kernels.norm_rotate_store_, torch.bfloat16),
        (REFERENCE.norm_rotate_store_, torch.float64),
    ):
        q_D, k_D = weights.to(dtype)
        given = qkv.to(dtype, copy=True)
        keys = torch.zeros(num_slots, 2, head_dim, dtype=dtype, device=DEVICE)
        cache = CacheSlots(slots, keys, torch.zeros_like(keys))
        norm = QKNormWeights(q_D, k_D, 1e-6) if with_norm else None
        cos, sin = rope.to(dtype)
        function(given, num_heads, norm, (cos, sin), cache)
        results.append((given, cache.keys_NKD, cache.values_NKD))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)
