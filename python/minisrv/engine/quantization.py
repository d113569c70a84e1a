"""Where `--quantization` applies. Does not import torch."""

from __future__ import annotations

from typing import Literal

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.option_values import flag

Quantization = Literal["none", "int8", "int4"]


def has_packed_weights(config: ServerConfig, model: ModelConfig, device: str) -> bool:
    """Whether the matrices are held in 4 or 8 bits; on a GPU ("cuda") they are dequantized."""
    return device == "cpu" and (model.packed is not None or config.quantization != "none")


def check_quantization(config: ServerConfig, model: ModelConfig, device: str) -> None:
    """Raise ConfigError if it is given, but not for this device ("cpu", "cuda") or checkpoint."""
    if config.quantization == "none":
        return
    given = f"{flag('quantization')} {config.quantization}"
    if device != "cpu":
        raise ConfigError(
            f"{given} is for CPUs only; on a GPU leave it out or serve an FP8 checkpoint"
        )
    if model.packed is not None:
        raise ConfigError(
            f"{given} rounds bfloat16, float16 and float32 weights, but those of this file are "
            f"{', '.join(model.packed.kinds)} already; leave it out"
        )
    if model.fp8 is not None:
        raise ConfigError(
            f"{given} rounds bfloat16, float16 and float32 weights, but those of this checkpoint "
            "are FP8 already; leave it out"
        )
