"""The weights of GGUF files: equal to the original's, or to what the package `gguf` dequantizes.

MINISRV_LLAMA_QUANTIZE: the program `llama-quantize`, which writes K types; without it that test is
skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from minisrv.checkpoint.gguf.names import gguf_name
from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from minisrv.engine.gguf_weights import GgufWeights
from minisrv.engine.packed import PackedMatrix
from minisrv.engine.parallel.shard import Shard
from minisrv.errors import ConfigError
from tests.support.checkpoints import ARCHITECTURES, make_checkpoint
from tests.support.gguf_files import Kind, in_halves, read_back, take_all, write_gguf

QUANTIZE = os.environ.get("MINISRV_LLAMA_QUANTIZE")
ROUTER = "mlp.gate.weight"
SHAPE = {"moe_intermediate_size": 64}
PACKED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    variant: dict[str, Any] = SHAPE if request.param == "qwen3_moe" else {}
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, request.param, **variant)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=True)


def open_weights(path: Path, **options: Any) -> tuple[GgufWeights, ModelConfig]:
    config = load_model_config(path)
    options = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    return GgufWeights(path, config, **options), config


def rounded(name: str, tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
    if tensor.dim() == 1 or name.endswith(ROUTER) or kind is Kind.F32:
        return tensor
    return torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
    )


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *PACKED])
def test_tensors_equal_the_original_as_the_type_has_them(
    kind: Kind, original: Path, tmp_path: Path
) -> None:
    weights, config = open_weights(write_gguf(original, tmp_path / "model.gguf", kind))
    progress: list[float] = []
    weights._progress = lambda stage, fraction, *size: progress.append(fraction)
    taken = take_all(weights, config)
    expected = load_file(original / "model.safetensors")
    assert taken.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(taken[name], rounded(name, tensor, kind)), name
    assert progress[-1] == 1.0
    assert progress == sorted(progress)


@pytest.mark.skipif(QUANTIZE is None, reason="MINISRV_LLAMA_QUANTIZE is not set")
@pytest.mark.parametrize("mixture", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_files_of_llama_cpp_are_read_bit_for_bit(
    architecture: str, mixture: str, tmp_path: Path
) -> None:
    variant = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    if architecture == "qwen3_moe":
        variant["moe_intermediate_size"] = 256
    checkpoint = make_checkpoint(tmp_path / "original", architecture, **variant)
    whole, path = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    write_gguf(checkpoint, whole, Kind.BF16)
    command = [QUANTIZE or "", str(whole), str(path), mixture, "1"]
    subprocess.run(command, check=True, capture_output=True)
    weights, config = open_weights(path)
    assert config.packed is not None
    expected = read_back(path)
    for name, tensor in take_all(weights, config).items():
        in_file, expert = gguf_name(name)
        read = torch.from_numpy(expected[in_file].copy())
        read = read if expert is None else read[expert]
        if architecture == "llama" and in_file.endswith(("attn_q.weight", "attn_k.weight")):
            read = in_halves(read, config.head_dim)
        assert torch.equal(tensor, read), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0])
def test_bytes_are_counted_as_they_are_held(kind: Kind, llama: Path, tmp_path: Path) -> None:
    weights, config = open_weights(write_gguf(llama, tmp_path / "model.gguf", kind))
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    up = weights.load_matrix(names[0], (config.intermediate_size, config.hidden_size))
    assert isinstance(up, PackedMatrix) == (kind is Kind.Q4_0)
    weights.load_tensor(names[1], (config.hidden_size,))
    count = config.intermediate_size * config.hidden_size
    matrix_bytes = count * 4 if kind is Kind.F32 else count // 32 * 18
    assert weights.num_bytes == matrix_bytes + config.hidden_size * 4


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_plain_matrices_can_be_rounded(quantization: str, llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", Kind.BF16)
    weights, config = open_weights(path, quantization=quantization)
    shape = (config.intermediate_size, config.hidden_size)
    up = weights.load_matrix("model.layers.0.mlp.up_proj.weight", shape)
    assert isinstance(up, PackedMatrix)
    assert up.bits == int(quantization[-1])
    assert weights.num_bytes == up.num_bytes


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("self_attn.q_proj", Shard(0, 32, 32)),
        ("self_attn.k_proj", Shard(0, 16, 16)),
        ("mlp.up_proj", Shard(0, 64, 64)),
        ("self_attn.o_proj", Shard(1, 32, 32)),
        ("mlp.down_proj", Shard(1, 64, 64)),
    ],
)
def test_a_shard_is_a_part_of_the_whole(
    kind: Kind, name: str, shard: Shard, llama: Path, tmp_path: Path
) -> None:
    weights, _ = open_weights(write_gguf(llama, tmp_path / "model.gguf", kind))
    name = f"model.layers.1.{name}.weight"
    tensor = load_file(llama / "model.safetensors")[name]
    whole = rounded(name, tensor, kind)
    for load in (weights.load_tensor, weights.load_matrix):
        part = load(name, tuple(tensor.shape), shard)
        part = part.dequantized() if isinstance(part, PackedMatrix) else part
        assert torch.equal(part, whole.narrow(shard.dim, shard.start, shard.length))


def test_a_tied_head_is_not_in_the_file(llama: Path, tmp_path: Path) -> None:
    weights, config = open_weights(write_gguf(llama, tmp_path / "model.gguf"))
    assert config.tie_word_embeddings
    assert not weights.has_own("lm_head.weight", "model.embed_tokens.weight")


def test_names_and_shapes_that_do_not_fit_are_refused(llama: Path, tmp_path: Path) -> None:
    weights, _ = open_weights(write_gguf(llama, tmp_path / "model.gguf"))
    with pytest.raises(ConfigError, match=r"model.gguf lacks blk.0.attn_q.bias"):
        weights.load_tensor("model.layers.0.self_attn.q_proj.bias", (64,))
    with pytest.raises(ConfigError, match=r"attn_q.weight .* has shape \[64, 64\].*\[64, 32\]"):
        weights.load_matrix("model.layers.0.self_attn.q_proj.weight", (64, 32))
    with pytest.raises(ConfigError, match=r"has unexpected token_embd.weight, .* and \d+ more"):
        weights.finish()
