"""FP8 checkpoints compute what their dequantized weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisrv.checkpoint.model_config import Fp8Config, load_model_config
from minisrv.engine.parallel.shard import Shard
from minisrv.engine.weights import CheckpointWeights
from minisrv.errors import ConfigError, UnsupportedModelError
from tests.support.checkpoints import make_checkpoint
from tests.support.step_driver import StepDriver, open_engine

BLOCK = (48, 40)  # divides none of the matrices
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "matrix": ("_scale_inv", FP8),
    "block": ("_scale_inv", {**FP8, "weight_block_size": list(BLOCK)}),
    "row": ("_scale", {"quant_method": "fbgemm_fp8"}),
    "compressed-matrix": (
        "_scale",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
        },
    ),
}


def quantize(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight in FP8, its scales, and what the two stand for."""
    outputs, inputs = weight.shape
    block = {"row": (1, inputs), "block": BLOCK}.get(scheme, (outputs, inputs))
    scales = torch.empty(-(-outputs // block[0]), -(-inputs // block[1]))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    exact = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[part] = stored[part].float() * scales[i, j]
    if scheme == "matrix":
        scales = scales.reshape(())
    return stored, scales, exact


def write_pair(folder: Path, architecture: str, scheme: str) -> tuple[Path, Path]:
    """An FP8 checkpoint, and one of the numbers that it stands for."""
    paths = folder / "fp8", folder / "plain"
    for path in paths:
        make_checkpoint(path, architecture)
    suffix, quantization = SCHEMES[scheme]
    tensors = load_file(paths[0] / "model.safetensors")
    stored, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[name + suffix], plain[name] = quantize(weight, scheme)
            stored[name.replace(".weight", ".input_scale")] = torch.ones(1)
    save_file(stored, paths[0] / "model.safetensors")
    save_file(plain, paths[1] / "model.safetensors")
    edit_config(paths[0], quantization_config=quantization)
    return paths


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def logits(path: Path) -> torch.Tensor:
    driver = StepDriver(open_engine(path))
    return driver.logits(prefills=[(driver.add(), list(range(1, 40)))])


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_logits_are_those_of_the_dequantized_model(
    tmp_path: Path, architecture: str, scheme: str
) -> None:
    quantized, plain = write_pair(tmp_path, architecture, scheme)
    assert torch.equal(logits(quantized), logits(plain))


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("shard", [Shard(0, 50, 30), Shard(1, 17, 33)])
def test_a_part_of_a_matrix_is_scaled_as_in_the_whole(
    tmp_path: Path, scheme: str, shard: Shard
) -> None:
    quantized, _ = write_pair(tmp_path, "llama", scheme)
    weights = CheckpointWeights(
        quantized, dtype=torch.float32, device=torch.device("cpu"), fp8=Fp8Config(BLOCK)
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = weights.load_tensor(name, (128, 64))
    part = weights.load_tensor(name, (128, 64), shard)
    assert torch.equal(part, whole.narrow(shard.dim, shard.start, shard.length))


def test_the_type_to_compute_in_is_that_of_the_plain_tensors(tmp_path: Path) -> None:
    quantized, _ = write_pair(tmp_path, "llama", "matrix")
    edit_config(quantized, dtype=None)
    weights = CheckpointWeights(quantized, dtype=None, device=torch.device("cpu"), fp8=Fp8Config())
    assert weights.dtype == torch.float32


def test_a_scale_that_is_missing_fits_nothing_or_is_not_announced_is_an_error(
    tmp_path: Path,
) -> None:
    quantized, _ = write_pair(tmp_path, "llama", "row")
    path = quantized / "model.safetensors"
    tensors = load_file(path)
    scale = "model.layers.0.mlp.gate_proj.weight_scale"
    save_file({**tensors, scale: torch.ones(5, 7)}, path)
    with pytest.raises(ConfigError, match=r"gate_proj.weight has shape \[128, 64\] and scales"):
        open_engine(quantized)
    save_file({k: v for k, v in tensors.items() if k != scale}, path)
    with pytest.raises(ConfigError, match=rf"lacks {scale}"):
        open_engine(quantized)
    edit_config(quantized, quantization_config=None)
    with pytest.raises(ConfigError, match="no quantization_config for it"):
        open_engine(quantized)


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'; minisrv reads FP8"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'; minisrv reads FP8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "'compressed-tensors'; minisrv reads FP8",
        ),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'; minisrv reads FP8"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any], sentence: str
) -> None:
    path = make_checkpoint(tmp_path, "llama")
    edit_config(path, quantization_config=quantization)
    with pytest.raises(UnsupportedModelError, match=sentence):
        load_model_config(path)


def test_a_block_size_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    edit_config(path, quantization_config={**FP8, "weight_block_size": [128, 0]})
    with pytest.raises(ConfigError, match="weight_block_size"):
        load_model_config(path)
