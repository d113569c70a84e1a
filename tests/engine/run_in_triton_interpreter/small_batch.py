"""The joined kernels for small batches, in Triton's interpreter; run by test_triton_kernels.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisrv.engine import rank_engine
from minisrv.engine.kernels import triton_dependency, triton_small_batch
from minisrv.engine.kernels.base import (
    CacheSlots,
    ExpertWeights,
    NormWeight,
    PlainProduct,
    QKNormWeights,
)
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kernels.triton_moe import run_experts
from minisrv.engine.kernels.triton_small_batch import TritonSmallBatch
from minisrv.llm import LLM
from minisrv.sampling_params import SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.device_parts import use_device_runner
from tests.support.launches import Launches

SMALL, TORCH = TritonSmallBatch(), TorchKernels()
# float16 stands in for bfloat16, whose products the interpreter computes wrongly.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3}
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.soak)], ids=str
)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def product(
    outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool
) -> tuple[PlainProduct, PlainProduct]:
    """A random product, and the same in float64."""
    weight = random(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    bias_O = random(outputs, dtype=dtype) if bias else None
    exact = PlainProduct(weight.double(), None if bias_O is None else bias_O.double())
    return PlainProduct(weight, bias_O), exact


def norm_of(size: int, dtype: torch.dtype) -> NormWeight:
    return NormWeight((torch.rand(size) + 0.5).to(dtype), 1e-5)


def normed(x_TC: Tensor, norm: NormWeight) -> Tensor:
    return TORCH.add_rms_norm_(x_TC.double(), None, norm.w_C.double(), norm.eps)


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@by_dtype
@pytest.mark.parametrize(
    ("num_tokens", "inputs", "head_dim", "num_heads", "num_kv_heads", "qk_norm", "bias"),
    [
        (1, 64, 64, 2, 1, True, False),
        (5, 200, 128, 3, 2, True, True),
        (16, 136, 32, 4, 4, False, True),
        (3, 40, 256, 2, 1, False, False),
    ],
)
def test_the_heads_are_those_of_the_separate_kernels(
    num_tokens: int,
    inputs: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    qk_norm: bool,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    num_all_heads = num_heads + 2 * num_kv_heads
    projection, exact = product(num_all_heads * head_dim, inputs, dtype, bias=bias)
    x, norm = random(num_tokens, inputs, dtype=dtype, scale=3.0), norm_of(inputs, dtype)
    weights = (torch.rand(2, head_dim) + 0.5).to(dtype)
    angles = random(2, num_tokens, 1, head_dim, dtype=dtype)
    slots = torch.randperm(40)[:num_tokens]
    found = []
    for to in (dtype, torch.float64):
        keys, values = torch.zeros(2, 40, num_kv_heads, head_dim, dtype=to)
        cache, rope_rows = CacheSlots(slots, keys, values), tuple(angles.to(to))
        head_norm = QKNormWeights(*weights.to(to), 1e-6) if qk_norm else None
        if to is dtype:
            qkv = SMALL.project_heads(x, norm, projection, num_heads, head_norm, rope_rows, cache)
        else:
            qkv = exact(normed(x, norm)).view(num_tokens, num_all_heads, head_dim)
            TORCH.norm_rotate_store_(qkv, num_heads, head_norm, rope_rows, cache)
        found.append((qkv, keys, values))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype is dtype
        assert_close(ours, theirs, dtype)


@by_dtype
@pytest.mark.parametrize(
    ("num_tokens", "inputs", "features", "bias"),
    [(1, 64, 32, False), (7, 300, 48, True), (16, 128, 80, False)],
)
def test_gate_and_up_are_those_of_the_separate_kernels(
    num_tokens: int, inputs: int, features: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    projection, exact = product(2 * features, inputs, dtype, bias=bias)
    x, norm = random(num_tokens, inputs, dtype=dtype, scale=0.1), norm_of(inputs, dtype)
    ours = SMALL.gate_and_up(x, norm, projection)
    assert ours.dtype is dtype
    assert_close(ours, TORCH.silu_and_mul(exact(normed(x, norm))), dtype)


@by_dtype
@pytest.mark.parametrize(
    ("num_tokens", "inputs", "outputs", "bias"),
    [(1, 64, 16, False), (6, 700, 40, True), (16, 512, 33, False)],
)
def test_the_product_is_added(
    num_tokens: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    projection, exact = product(outputs, inputs, dtype, bias=bias)
    x, sums = random(num_tokens, inputs, dtype=dtype), random(num_tokens, outputs, dtype=dtype)
    expected = sums.double() + exact(x.double())
    SMALL.add_product_(x, projection, sums)
    assert_close(sums, expected, dtype)


def experts_of(
    num_experts: int, hidden: int, features: int, dtype: torch.dtype
) -> tuple[ExpertWeights, ExpertWeights]:
    """Random experts, and the same in float64."""
    gate_up = random(num_experts, 2 * features, hidden, dtype=dtype, scale=hidden**-0.5)
    down = random(num_experts, hidden, features, dtype=dtype, scale=features**-0.5)
    return ExpertWeights(gate_up, down), ExpertWeights(gate_up.double(), down.double())


def with_experts(
    x_TC: Tensor,
    norm: NormWeight,
    router: PlainProduct,
    experts: ExpertWeights,
    per_token: int,
    normalize: bool,
) -> Tensor:
    """The tokens and what their experts add, expert by expert in float64."""
    normed_TC, out_TC = normed(x_TC, norm), x_TC.double()
    scores_TN, experts_TN = TORCH.route(router(normed_TC), per_token, normalize)
    for token, (scores, chosen) in enumerate(zip(scores_TN, experts_TN, strict=True)):
        for score, expert in zip(scores, chosen, strict=True):
            hidden = TORCH.silu_and_mul(experts.gate_up_EGC[expert] @ normed_TC[token])
            out_TC[token] += score * (experts.down_ECF[expert] @ hidden)
    return out_TC


@by_dtype
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "per_token", "hidden", "features", "normalize"),
    [
        (1, 16, 8, 64, 32, True),
        (5, 7, 2, 200, 80, False),
        (16, 2, 2, 64, 16, True),
        pytest.param(16, 40, 3, 128, 300, True, marks=pytest.mark.soak),
    ],
)
def test_the_experts_are_those_of_the_separate_kernels(
    num_tokens: int,
    num_experts: int,
    per_token: int,
    hidden: int,
    features: int,
    normalize: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(4)
    router, exact_router = product(num_experts, hidden, dtype, bias=False)
    experts, exact = experts_of(num_experts, hidden, features, dtype)
    x, norm = random(num_tokens, hidden, dtype=dtype, scale=3.0), norm_of(hidden, dtype)
    expected = with_experts(x, norm, exact_router, exact, per_token, normalize)
    SMALL.add_experts_(x, norm, router, experts, per_token, normalize)
    assert_close(x, expected, dtype)


def test_of_equal_experts_the_first_is_chosen() -> None:
    torch.manual_seed(5)
    router = PlainProduct(torch.zeros(6, 64), None)
    experts, exact = experts_of(6, 64, 32, torch.float32)
    x, norm = torch.randn(2, 64), norm_of(64, torch.float32)
    first = ExpertWeights(exact.gate_up_EGC[:2], exact.down_ECF[:2])
    half = PlainProduct(torch.zeros(2, 64, dtype=torch.float64), None)
    expected = with_experts(x, norm, half, first, 2, True)
    SMALL.add_experts_(x, norm, router, experts, 2, True)
    assert_close(x, expected, torch.float32)


def test_the_experts_of_a_token_do_not_depend_on_the_others() -> None:
    torch.manual_seed(6)
    router, _ = product(9, 64, torch.float32, bias=False)
    experts, _ = experts_of(9, 64, 32, torch.float32)
    x, norm = torch.randn(6, 64), norm_of(64, torch.float32)
    results = []
    for count in (6, 1, 4):
        results.append(x[:count].clone())
        SMALL.add_experts_(results[-1], norm, router, experts, 3, True)
    assert torch.equal(results[1], results[0][:1])
    assert torch.equal(results[2], results[0][:4])


def test_a_token_does_not_depend_on_the_others() -> None:
    torch.manual_seed(3)
    projection, _ = product(64, 128, torch.float32, bias=False)
    x, norm = random(16, 128, dtype=torch.float32), norm_of(128, torch.float32)
    together = SMALL.gate_and_up(x, norm, projection)
    for count in (1, 5):
        assert torch.equal(SMALL.gate_and_up(x[:count], norm, projection), together[:count])


def test_float16_is_left_to_the_separate_kernels() -> None:
    assert not SMALL.suits(PlainProduct(torch.zeros(2, 2, dtype=torch.float16), None))
    assert SMALL.suits(PlainProduct(torch.zeros(2, 2, dtype=torch.bfloat16), None))


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_a_served_model_gives_the_same_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of two, and one of five, which is too large here."""
    pytest.importorskip("flashinfer")
    use_device_runner(monkeypatch)
    monkeypatch.setattr(TritonSmallBatch, "most_tokens", 4)
    directory = make_checkpoint(tmp_path, kind, num_hidden_layers=1)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [[5, 6, 7, 8 + i] for i in range(5)]
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1}
    options |= {"cuda_graph_max_bs": 2, "max_running_requests": 8}
    launches = Launches(monkeypatch)
    choose_backends = rank_engine.choose_backends

    def with_joined(*args: Any) -> Any:
        kernels, attention = choose_backends(*args)
        kernels.small_batch, kernels.run_experts = SMALL, run_experts
        return kernels, attention

    outputs = []
    for choose in (choose_backends, with_joined):
        monkeypatch.setattr(rank_engine, "choose_backends", choose)
        with LLM(directory, **options) as llm:
            for batch in (prompts[:2], prompts):
                results = llm.generate_outputs(batch, params, use_tqdm=False)
                outputs.append([result.outputs[0].token_ids for result in results])
        kernel = "_add_experts" if kind == "qwen3_moe" else "_gate_and_up"
        assert (kernel in launches.names) == (choose is with_joined)
    assert outputs[:2] == outputs[2:]


def test_the_kernels_wait_for_the_one_before_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(triton_dependency, "gdc_wait", lambda: calls.append("wait"))
    monkeypatch.setattr(triton_dependency, "gdc_launch_dependents", lambda: calls.append("launch"))
    monkeypatch.setattr(triton_dependency, "_is_on", True)
    projection, exact = product(33, 64, torch.float32, bias=False)
    x, sums = torch.randn(2, 64), torch.zeros(2, 33)
    SMALL.add_product_(x, projection, sums)
    num_programs = -(-33 // triton_small_batch._OUTPUTS)
    assert calls == ["wait", "launch"] * num_programs
    assert_close(sums, exact(x.double()), torch.float32)
