"""The gated feed-forward layer (Shazeer, 2020)."""

# Shapes: T tokens in the step, C hidden size, F intermediate size.

from __future__ import annotations

from torch import Tensor

from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import load_linear


class GatedMLP:
    """x_TC -> down(silu(gate(x)) * up(x))."""

    def __init__(
        self, build: BuildContext, name: str, intermediate_size: int, bias: bool = False
    ) -> None:
        hidden_size, weights = build.config.hidden_size, build.weights
        self._silu_and_mul = build.kernels.silu_and_mul
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        self._gate_up = load_linear(weights, names, hidden_size, [intermediate_size] * 2, bias)
        self._down = load_linear(
            weights, [f"{name}.down_proj"], intermediate_size, [hidden_size], bias
        )

    def __call__(self, x_TC: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        return self._down(self._silu_and_mul(self._gate_up(x_TC)))
