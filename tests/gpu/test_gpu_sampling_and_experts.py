"""The kernels of sampling and experts at the sizes of real models, eager and in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from minisrv.engine.kernels.base import ExpertWeights, PenaltyColumns
from minisrv.engine.kernels.torch_native import TorchKernels
from tests.support.step_driver import sampling_columns

pytest.importorskip("triton")
from minisrv.engine.kernels.triton_moe import run_experts
from minisrv.engine.kernels.triton_norm import add_parts_and_norm
from minisrv.engine.kernels.triton_penalize import penalize
from minisrv.engine.kernels.triton_route import route
from minisrv.engine.kernels.triton_sample import sample_on_device
from minisrv.engine.sampling.device_columns import CountedPenalties, DeviceColumns
from tests.engine.run_in_triton_interpreter.sample import CASES, expected

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_draws_are_those_of_torch_eager_and_in_a_graph(dtype: torch.dtype) -> None:
    rows, vocab = len(CASES), 151_936
    logits = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    filters = {name: [case.get(name, off) for case in CASES] for name, off in defaults.items()}
    columns = sampling_columns(rows, temperature=0.6, seeds=np.arange(rows), **filters)
    positions = np.arange(rows)
    given = DeviceColumns.from_host(columns, positions, DEVICE)
    on_device, out = logits.to(DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    eager = sample_on_device(on_device, given, out).tolist()
    theirs = expected(logits, columns, positions).tolist()
    # Sums in float32 may move the cut of one top-p by a token.
    assert sum(a != b for a, b in zip(eager, theirs, strict=True)) <= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_on_device(on_device, given, out)
    out.zero_()
    graph.replay()
    assert out.tolist() == eager


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_penalties_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, vocab = 256, 151_936
    counts = (torch.randint(0, 2000, (rows, vocab), device=DEVICE) - 1990).clamp(min=-1).short()
    counts[counts == -1] = torch.randint_like(counts[counts == -1], -1, 1)
    columns = PenaltyColumns(
        torch.randperm(rows, device=DEVICE),
        torch.randperm(rows, device=DEVICE),
        torch.rand(3, rows, device=DEVICE) * 2 + 0.01,
    )
    ours = torch.randn(rows, vocab, device=DEVICE).mul_(5).to(dtype)
    theirs = ours.clone()
    penalize(ours, counts, columns)
    TorchKernels().penalize_(theirs, counts, columns)
    # In 16 bits a sum that is rounded once more may end up one step away.
    torch.testing.assert_close(ours, theirs, rtol=max(1e-6, 2 * torch.finfo(dtype).eps), atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 300, 4096])
def test_experts_eager_and_in_a_graph(num_tokens: int) -> None:
    torch.manual_seed(0)
    num_experts, hidden, features, per_token = 128, 2048, 768, 8

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    gate_up = half(num_experts, 2 * features, hidden) / hidden**0.5
    weights = ExpertWeights(gate_up, half(num_experts, hidden, features) / features**0.5)
    x = half(num_tokens, hidden)
    scores = torch.rand(num_tokens, per_token, device=DEVICE).bfloat16()
    chosen = torch.rand(num_tokens, num_experts, device=DEVICE).topk(per_token, -1).indices
    theirs = torch.zeros(num_tokens, hidden, device=DEVICE, dtype=torch.float64)
    for expert in range(num_experts):
        tokens, which = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].double() @ weights.gate_up_EGC[expert].double().T).chunk(2, -1)
        part = (torch.nn.functional.silu(gate) * up) @ weights.down_ECF[expert].double().T
        theirs.index_add_(0, tokens, part * scores[tokens, which].double()[:, None])
    eager = run_experts(x, weights, scores, chosen)
    torch.testing.assert_close(eager.sum(1).double(), theirs, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_experts(x, weights, scores, chosen)
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("num_tokens", [1, 300, 4096])
def test_the_router_and_the_norm_behind_the_experts(num_tokens: int) -> None:
    torch.manual_seed(0)
    reference = TorchKernels()
    logits = (torch.randn(num_tokens, 128, device=DEVICE) * 4).bfloat16()
    scores, experts = route(logits, 8, True)
    theirs, chosen = reference.route(logits, 8, True)
    torch.testing.assert_close(scores, theirs, rtol=1e-2, atol=1e-6)
    probs = logits.softmax(-1, dtype=torch.float32)
    torch.testing.assert_close(probs.gather(1, experts), probs.gather(1, chosen))
    x, weight = torch.randn(num_tokens, 2048, device=DEVICE), torch.rand(2048, device=DEVICE)
    parts = torch.randn(num_tokens, 8, 2048, device=DEVICE)
    ours, expected = x.bfloat16(), x.bfloat16().double()
    normed = add_parts_and_norm(ours, parts.bfloat16(), weight.bfloat16(), 1e-6)
    wanted = reference.add_rms_norm_(
        expected, parts.bfloat16().double(), weight.bfloat16().double(), 1e-6
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(normed.double(), wanted, rtol=2e-2, atol=2e-2)


def test_penalties_biases_and_counts_in_a_graph() -> None:
    """Three draws of 64 samples, each from the counts that the one before it left."""
    torch.manual_seed(0)
    rows, vocab = 64, 151_936
    logits = torch.randn(rows, vocab, device=DEVICE) * 3
    counts = torch.randint(-1, 2, (rows, vocab), device=DEVICE).short()
    factors = torch.rand(3, rows, device=DEVICE) + 0.5
    factors[:, ::4] = torch.tensor([[1.0], [0.0], [0.0]], device=DEVICE)
    order = torch.randperm(rows, device=DEVICE)
    columns = PenaltyColumns(torch.arange(rows, device=DEVICE), order.int(), factors)
    host = sampling_columns(rows, suppress=[(i, 7 * i) for i in range(rows)])
    given = DeviceColumns.from_host(host, np.arange(rows), DEVICE)
    given = replace(given, penalties=CountedPenalties(counts, columns))
    ours, out = logits.clone(), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    sample_on_device(ours, given, out)  # compiles what the graph contains
    counts_before = counts.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.copy_(logits)
        sample_on_device(ours, given, out)
    reference, changing = TorchKernels(), (factors[0] != 1).nonzero().squeeze(1)
    for _ in range(3):
        graph.replay()
        theirs = logits.clone()
        reference.penalize_(theirs, counts_before, columns)
        theirs[torch.arange(rows), torch.arange(rows) * 7] = -torch.inf
        assert out.tolist() == theirs.argmax(-1).tolist()
        at = order[changing], out[changing].long()
        counts_before[at] = counts_before[at].clamp(min=0) + 1
        assert torch.equal(counts, counts_before)
