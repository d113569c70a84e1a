"""Of activations and of the KV cache, by options and checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minisrv.checkpoint.model_config import ModelConfig, PackedConfig
from minisrv.config import ServerConfig
from minisrv.engine.backends import activation_dtype, cache_dtype
from minisrv.engine.weights import DummyWeights
from tests.engine.test_shard import CONFIG

CPU = torch.device("cpu")
MODEL = replace(CONFIG, dtype="bfloat16")
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
