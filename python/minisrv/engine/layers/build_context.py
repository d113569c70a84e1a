"""What the layers of a model are built from."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.engine.attention.base import LayerAttention
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.layers.rope import RotaryEmbedding
from minisrv.engine.parallel.communicator import Communicator
from minisrv.engine.weights import Weights


@dataclass(frozen=True, slots=True)
class BuildContext:
    """The checkpoint, and the implementations chosen for the device."""

    config: ModelConfig
    weights: Weights
    rope: RotaryEmbedding
    kernels: Kernels
    communicator: Communicator
    backend: LayerAttention
