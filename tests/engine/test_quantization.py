"""`--quantization`: which matrices are rounded, what they take, and where it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisrv.checkpoint.model_config import Fp8Config, load_model_config
from minisrv.commands.plan import main as plan
from minisrv.config import ServerConfig
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.layers.linear import Projection, load_linear
from minisrv.engine.layers.packed_linear import PackedLinear, SideBySide
from minisrv.engine.packed import PackedMatrix
from minisrv.engine.parallel.shard import Shard
from minisrv.engine.quantization import Quantization, check_quantization
from minisrv.engine.weights import CheckpointWeights, DummyWeights
from minisrv.errors import ConfigError
from tests.engine.test_packed import read
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.support.kernels import implementations
from tests.support.step_driver import StepDriver, open_engine

CPU = torch.device("cpu")
IDS = list(range(1, 40))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bits(matrix: object) -> int | None:
    return matrix.bits if isinstance(matrix, PackedMatrix) else None


@pytest.mark.parametrize(("quantization", "expected"), [("int8", 8), ("int4", 4)])
def test_matrices_are_rounded_and_the_ends_to_8_bits(
    tmp_path: Path, quantization: Quantization, expected: int
) -> None:
    save_file(
        {
            name: torch.randn(48, 64).bfloat16()
            for name in (EMBEDDING, HEAD, "a.q_proj.weight", "a.mlp.gate.weight")
        },
        tmp_path / "model.safetensors",
    )
    weights = CheckpointWeights(tmp_path, dtype=None, device=CPU, quantization=quantization)
    assert weights.packs
    found = {
        name: bits(weights.load_matrix(name, (48, 64)))
        for name in (EMBEDDING, HEAD, "a.q_proj.weight", "a.mlp.gate.weight")
    }
    weights.finish()
    assert found == {
        EMBEDDING: 8,
        HEAD: 8,
        "a.q_proj.weight": expected,
        "a.mlp.gate.weight": None,
    }
    in_eight = 48 * (64 + 2 * 2)
    other = in_eight if expected == 8 else 48 * (32 + 2 * 2)
    assert weights.num_bytes == 2 * in_eight + other + 48 * 64 * 2


def test_numbers_are_rounded_as_they_are_stored(tmp_path: Path) -> None:
    """Not after they have been rounded to the type of the activations."""
    weight = torch.randn(8, 32)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    options = {"dtype": torch.bfloat16, "device": CPU}
    matrix = CheckpointWeights(tmp_path, **options, quantization="int8").load_matrix("w", (8, 32))
    assert isinstance(matrix, PackedMatrix)
    assert torch.equal(matrix.scales.squeeze(1), (weight.abs().amax(1) / 127).half())


def test_rows_that_are_not_whole_groups_are_kept_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(
        {"odd": torch.randn(8, 48), "even": torch.randn(8, 64)}, tmp_path / "model.safetensors"
    )
    weights = CheckpointWeights(tmp_path, dtype=None, device=CPU, quantization="int4")
    assert bits(weights.load_matrix("odd", (8, 48))) is None
    assert bits(weights.load_matrix("even", (8, 64), Shard(1, 32, 32))) == 4
    weights.finish()
    assert caplog.messages == ["the rows of odd are not a multiple of 32 long and are not rounded"]


def test_dummy_weights_are_rounded_too() -> None:
    weights = DummyWeights(dtype=torch.bfloat16, device=CPU, quantization="int4")
    matrix = weights.load_matrix("w", (16, 64))
    assert isinstance(matrix, PackedMatrix)
    assert weights.num_bytes == matrix.num_bytes == 16 * (32 + 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_engine_counts_the_packed_bytes(tmp_path: Path, quantization: str, tied: bool) -> None:
    path = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=tied, dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    expected = 0
    for name, tensor in tensors.items():
        in_eight = quantization == "int8" or name in (EMBEDDING, HEAD)
        if tensor.dim() == 2:
            expected += tensor.numel() * (34 if in_eight else 18) // 32
        else:
            expected += tensor.numel() * torch.float32.itemsize  # as activations
    engine = open_engine(path, quantization=quantization)
    assert engine.memory_plan.weights == expected
    assert engine.placement == f"float32 on cpu, {quantization} weights"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_logits_of_the_kernels_are_near_the_reference(tmp_path: Path, quantization: str) -> None:
    path = make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    found = []
    for options in ({"kernels": "torch"}, {}, {"kernels": "torch", "quantization": "none"}):
        engine = open_engine(path, **{"quantization": quantization, **options})
        driver = StepDriver(engine)
        found.append(driver.logits(prefills=[(driver.add(), IDS)])[0])
        assert found[-1].dtype is torch.float32
        assert found[-1].shape == (VOCAB_SIZE,)
    reference, ours, plain = found
    of_inputs = (ours - reference).norm() / reference.norm()
    of_weights = (plain - reference).norm() / plain.norm()
    assert of_inputs < 0.08
    if quantization == "int4":
        assert of_inputs < of_weights


class StoredWeights(DummyWeights):
    """Matrices by name."""

    def __init__(self, matrices: dict[str, torch.Tensor | PackedMatrix]) -> None:
        super().__init__(dtype=torch.float32, device=CPU)
        self._matrices = matrices

    def load_matrix(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor | PackedMatrix:
        assert self._matrices[name].shape == tuple(shape)
        return self._matrices[name]

    def load_tensor(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor:
        return torch.full(tuple(shape), float(len(name)))


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_several_formats_lie_side_by_side(bias: bool) -> None:
    """As in Q4_K_M files, where the values of attention have another type."""
    torch.manual_seed(0)
    matrices: dict[str, torch.Tensor | PackedMatrix] = {
        "q.weight": read("Q4_K", 40, 256, 0),
        "k_.weight": read("Q4_K", 8, 256, 1),
        "v__.weight": read("Q6_K", 24, 256, 2),
        "other.weight": torch.randn(5, 256),
    }
    projections = [
        Projection(name.removesuffix(".weight"), matrix.shape[0])
        for name, matrix in matrices.items()
    ]
    x, numbers, biases = torch.randn(6, 256), [], []
    for name, matrix in matrices.items():
        plain = matrix.dequantized() if isinstance(matrix, PackedMatrix) else matrix
        numbers.append(plain)
        biases.append(torch.full((plain.shape[0],), float(len(name) - 2)))
    expected = x @ torch.cat(numbers).T + (torch.cat(biases) if bias else 0)
    for kernels in implementations(torch.float32):
        product = load_linear(StoredWeights(matrices), kernels, projections, 256, bias)
        assert isinstance(product, SideBySide)
        assert len(product.products) == 3
        exact = isinstance(kernels, TorchKernels)
        error = (product(x) - expected).norm() / expected.norm()
        assert error < (1e-5 if exact else 0.02)
    alone = load_linear(StoredWeights(matrices), TorchKernels(), projections[:2], 256, bias)
    assert isinstance(alone, PackedLinear)


def test_a_tied_head_and_the_embedding_are_one_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True, dtype=torch.bfloat16)
    rounded = []

    def round_int8(weight: torch.Tensor) -> PackedMatrix:
        rounded.append(tuple(weight.shape))
        return read("Q8_0", *weight.shape)

    monkeypatch.setattr("minisrv.engine.weights.round_int8", round_int8)
    open_engine(path, quantization="int4")
    assert rounded == [(VOCAB_SIZE, 64)]


def test_it_is_refused_where_it_does_not_apply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(tmp_path, "qwen3")
    model, config = load_model_config(path, None), ServerConfig(quantization="int8")
    check_quantization(config, model, "cpu")
    check_quantization(ServerConfig(), model, "cuda")
    with pytest.raises(ConfigError, match=r"^--quantization int8 is for CPUs only; on"):
        check_quantization(config, model, "cuda")
    fp8 = dataclasses.replace(model, fp8=Fp8Config())
    with pytest.raises(ConfigError, match="this checkpoint are FP8 already; leave it out"):
        check_quantization(config, fp8, "cpu")
    assert plan([str(path), "--gpu", "H100", "--quantization", "int4"]) == 2
    assert "--quantization int4 is for CPUs only" in capsys.readouterr().err
