"""The grouped expert kernels in Triton's interpreter; run by test_triton_kernels.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minisrv.checkpoint.model_config import load_model_config
from minisrv.engine.kernels import triton_moe
from minisrv.engine.kernels.base import ExpertWeights
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kernels.triton_moe import choose_tiles, run_experts
from minisrv.engine.kernels.triton_norm import add_parts_and_norm
from minisrv.engine.kernels.triton_route import route
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.moe import GroupedExperts, SeparateExperts, SparseMoe
from minisrv.engine.layers.norm import RMSNorm
from minisrv.engine.parallel.communicator import SingleRank
from minisrv.engine.parallel.shard import Sharding
from minisrv.engine.weights import CheckpointWeights
from tests.support.checkpoints import make_checkpoint
from tests.support.launches import Launches
from tests.support.step_driver import StepDriver, open_engine

EXPERTS, HIDDEN, FEATURES = 6, 80, 72
# Not bfloat16, of which the interpreter's dot would multiply the bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def expected(
    x: torch.Tensor, weights: ExpertWeights, scores: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """Token by token in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    gate_up, down = weights.gate_up_EGC.double(), weights.down_ECF.double()
    for token in range(x.shape[0]):
        for score, expert in zip(scores[token], chosen[token], strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            out[token] += score * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def routing(kind: str, tokens: int, per_token: int) -> torch.Tensor:
    if kind == "random":
        return torch.rand(tokens, EXPERTS).topk(per_token, -1).indices
    if kind == "one token each":
        return (torch.arange(tokens * per_token) % EXPERTS).view(tokens, per_token)
    return torch.arange(per_token).expand(tokens, per_token).contiguous() + 3


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.soak)], ids=str
)
@pytest.mark.parametrize(
    ("kind", "tokens", "per_token"),
    [
        ("random", 1, 2),
        ("random", 5, 3),
        ("random", 90, 2),
        ("one token each", 3, 2),
        ("all on the same", 40, 1),
        ("all on the same", 9, 3),
    ],
)
def test_the_grouped_products_are_those_of_float64(
    dtype: torch.dtype, kind: str, tokens: int, per_token: int
) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * FEATURES, HIDDEN).div(HIDDEN**0.5).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, FEATURES).div(FEATURES**0.5).to(dtype)
    weights = ExpertWeights(gate_up, down)
    x = torch.randn(tokens, HIDDEN).to(dtype)
    scores = torch.rand(tokens, per_token).to(dtype)
    chosen = routing(kind, tokens, per_token)
    pairs = run_experts(x, weights, scores, chosen)
    assert pairs.dtype is dtype
    ours = pairs.sum(1)
    tolerance = TOLERANCE[dtype]
    theirs = expected(x, weights, scores, chosen)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_every_pair_has_a_slot_in_a_tile_of_its_expert() -> None:
    torch.manual_seed(1)
    for tokens, num_experts, rows in (
        (1, 3, 16),
        (35, 5, 16),
        (70, 5, 16),
        (40, 128, 16),
        (300, 7, 64),
    ):
        chosen = torch.rand(tokens, num_experts).topk(2, -1).indices
        slot_pairs, tile_experts = triton_moe._place_pairs(chosen, num_experts, rows)
        assert slot_pairs.data_ptr() % 16 == tile_experts.data_ptr() % 16 == 0
        used = int((-(-chosen.flatten().bincount() // rows)).sum())
        slot_pairs = slot_pairs[: used * rows]
        pairs = slot_pairs[slot_pairs > 0] - 1
        assert sorted(pairs.tolist()) == list(range(2 * tokens))
        owners = tile_experts[:used].repeat_interleave(rows)[slot_pairs > 0] - 1
        assert owners.tolist() == chosen.flatten()[pairs.long()].tolist()
        assert (tile_experts > 0).tolist() == [i < used for i in range(len(tile_experts))]


@pytest.mark.parametrize("tokens", [4, 100, 140])
def test_each_choice_of_tiles_gives_the_same(tokens: int) -> None:
    torch.manual_seed(2)
    weights = ExpertWeights(torch.randn(2, 32, 16) / 4, torch.randn(2, 16, 16) / 4)
    x, scores = torch.randn(tokens, 16), torch.rand(tokens, 1)
    chosen = torch.randint(2, (tokens, 1))
    ours = run_experts(x, weights, scores, chosen).sum(1).double()
    theirs = expected(x, weights, scores, chosen)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert choose_tiles(tokens, 2, 4)[0].rows == {4: 16, 100: 64, 140: 128}[tokens]


def test_a_model_with_grouped_experts_gives_the_tokens_of_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path, "qwen3_moe")
    options = {"kernels": "torch", "device": "cpu"}
    logits = []
    for function in (None, run_experts):
        monkeypatch.setattr(
            TorchKernels, "run_experts", staticmethod(function) if function else None
        )
        driver = StepDriver(open_engine(directory, **options))
        logits.append(driver.logits(prefills=[(driver.add(), list(range(5, 12)))]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [GroupedExperts, SeparateExperts])
def test_the_parts_of_two_ranks_add_up_to_the_whole(tmp_path: Path, make: type) -> None:
    directory = make_checkpoint(tmp_path, "qwen3_moe")
    config = load_model_config(directory)
    assert config.moe is not None
    torch.manual_seed(3)
    x, scores = torch.randn(7, config.hidden_size), torch.rand(7, 2)
    chosen = torch.rand(7, config.moe.num_experts).topk(2, -1).indices

    def outputs(rank: int, size: int) -> torch.Tensor:
        kernels, communicator = TorchKernels(), SingleRank()
        kernels.run_experts, communicator.sharding = run_experts, Sharding(rank, size)
        weights = CheckpointWeights(directory, dtype=None, device=torch.device("cpu"))
        build = BuildContext(config, weights, None, kernels, communicator, None)
        delta = make(build, "model.layers.0.mlp", config.moe)(x, scores, chosen)
        return delta if delta.dim() == 2 else delta.sum(1)

    whole = outputs(0, 1)
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(outputs(0, 2) + outputs(1, 2), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_experts", "per_token"), [(6, 2), (128, 8), (60, 4), (3, 3), (5, 1)])
def test_the_router_is_that_of_torch(
    num_experts: int, per_token: int, dtype: torch.dtype, normalize: bool
) -> None:
    torch.manual_seed(4)
    logits = (torch.randn(5, num_experts) * 4).to(dtype)
    logits[3] *= 100
    scores, experts = route(logits, per_token, normalize)
    theirs, chosen = TorchKernels().route(logits, per_token, normalize)
    assert scores.dtype is dtype
    assert experts.dtype is torch.int64
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(scores, theirs, rtol=tolerance, atol=1e-7)
    probs = logits.softmax(-1, dtype=torch.float32)
    torch.testing.assert_close(probs.gather(1, experts), probs.gather(1, chosen))
    assert all(len(set(row)) == per_token for row in experts.tolist())


def test_of_equal_experts_the_first_is_taken() -> None:
    scores, experts = route(torch.zeros(2, 7), 3, True)
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(scores, torch.full((2, 3), 1 / 3))
    assert route(torch.zeros(0, 7), 3, True)[1].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_adds_the_parts_of_a_token(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    for tokens, parts, size in ((1, 8, 64), (5, 2, 80), (3, 1, 300), (0, 2, 64)):
        x, weight = torch.randn(tokens, size).to(dtype), torch.rand(size).to(dtype)
        delta = torch.randn(tokens, parts, size).to(dtype)
        ours, theirs = x.clone(), x.double()
        normed = add_parts_and_norm(ours, delta, weight, 1e-5)
        expected = TorchKernels().add_rms_norm_(theirs, delta.double(), weight.double(), 1e-5)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.soak
def test_a_sparse_layer_takes_five_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the norm behind it one, which sums the outputs of the experts."""
    directory = make_checkpoint(tmp_path, "qwen3_moe")
    config = load_model_config(directory)
    kernels = TorchKernels()
    kernels.run_experts = run_experts
    monkeypatch.setattr(kernels, "route", route)
    monkeypatch.setattr(kernels, "add_rms_norm_", add_parts_and_norm)
    weights = CheckpointWeights(directory, dtype=None, device=torch.device("cpu"))
    build = BuildContext(config, weights, None, kernels, SingleRank(), None)
    layer = SparseMoe(build, "model.layers.0.mlp", config.moe)
    norm = RMSNorm(build, "model.layers.1.input_layernorm")
    launches = Launches(monkeypatch)
    for tokens in (1, 7, 70):
        x, residual = torch.randn(2, tokens, config.hidden_size)
        launches.names.clear()
        with torch.inference_mode(), launches:
            delta = layer(x)
            norm(residual, delta)
        product, *others = launches.names
        assert product.startswith(("mm", "addmm", "linear"))
        assert others == ["_route", "_place", "_gate_up", "_down", "_add_parts_and_norm"]
