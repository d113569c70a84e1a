"""Of activations and of the KV cache, by options and checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minisrv.checkpoint.model_config import ModelConfig, PackedConfig, RopeConfig
from minisrv.config import ServerConfig
from minisrv.engine.backends import activation_dtype, cache_dtype
from minisrv.engine.weights import DummyWeights

CPU = torch.device("cpu")
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    max_seq_len=128,
    norm_eps=1e-6,
    rope=RopeConfig(),
    dtype="bfloat16",
)
FILE = replace(MODEL, packed=PackedConfig(("Q4_0",), 1000))


@pytest.mark.parametrize(
    ("config", "model", "activations", "cache"),
    [
        (ServerConfig(), MODEL, torch.bfloat16, torch.bfloat16),
        (ServerConfig(), FILE, torch.float32, torch.bfloat16),
        (ServerConfig(quantization="int4"), MODEL, torch.float32, torch.bfloat16),
        (ServerConfig(kernels="torch"), FILE, torch.float32, torch.float32),
        (ServerConfig(dtype="bfloat16"), FILE, torch.bfloat16, torch.bfloat16),
        (ServerConfig(dtype="float32"), FILE, torch.float32, torch.float32),
        (ServerConfig(kv_cache_dtype="fp8"), FILE, torch.float32, torch.float8_e4m3fn),
    ],
)
def test_packed_weights_on_a_cpu_get_float32_activations(
    config: ServerConfig, model: ModelConfig, activations: torch.dtype, cache: torch.dtype
) -> None:
    assert activation_dtype(config, model, CPU) is activations
    weights = DummyWeights(dtype=activations, device=CPU, quantization=config.quantization)
    assert cache_dtype(config, model, weights) is cache


def test_on_a_gpu_packed_weights_are_dequantized_to_bfloat16() -> None:
    assert activation_dtype(ServerConfig(), FILE, torch.device("cuda")) is torch.bfloat16
