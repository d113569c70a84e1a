"""The kernels of sampling and experts at the sizes of real models, eager and in a CUDA graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minisrv.engine.kernels.base import ExpertWeights, PenaltyColumns
from minisrv.engine.kernels.torch_native import TorchKernels
from tests.support.step_driver import sampling_columns

pytest.importorskip("triton")
from minisrv.engine.kernels.triton_moe import run_experts
from minisrv.engine.kernels.triton_penalize import penalize
from minisrv.engine.kernels.triton_sample import sample_on_device
from minisrv.engine.sampling.device_columns import DeviceColumns
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
    torch.testing.assert_close(eager.double(), theirs, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_experts(x, weights, scores, chosen)
    graph.replay()
    assert torch.equal(captured, eager)
