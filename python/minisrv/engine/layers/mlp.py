"""The gated feed-forward layer (Shazeer, 2020)."""

# Shapes: T tokens in the step, C hidden size, F intermediate size.

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.layers.linear import load_linear
from minisrv.engine.weights import Weights


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension, times the second half."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class GatedMLP:
    """x_TC -> down(silu(gate(x)) * up(x))."""

    def __init__(
        self, weights: Weights, name: str, hidden_size: int, intermediate_size: int, bias: bool
    ) -> None:
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        self._gate_up = load_linear(weights, names, hidden_size, [intermediate_size] * 2, bias)
        self._down = load_linear(
            weights, [f"{name}.down_proj"], intermediate_size, [hidden_size], bias
        )

    def __call__(self, x_TC: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        return self._down(silu_and_mul(self._gate_up(x_TC)))
