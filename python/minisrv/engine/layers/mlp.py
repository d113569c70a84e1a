"""The gated feed-forward layer (Shazeer, 2020)."""

# Shapes: T tokens in the step, C hidden size, F intermediate size.

from __future__ import annotations

from torch import Tensor

from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import Projection, load_linear, load_partial_linear


class PartialMLP:
    """down(silu(gate(x)) * up(x)) over this rank's features, a part of the sum over the ranks."""

    def __init__(
        self, build: BuildContext, name: str, intermediate_size: int, bias: bool = False
    ) -> None:
        hidden_size, weights = build.config.hidden_size, build.weights
        partition = build.peers.partition
        self._silu_and_mul = build.kernels.silu_and_mul
        cut = partition.even(intermediate_size, 0)
        projections = [
            Projection(f"{name}.{part}_proj", intermediate_size, cut) for part in ("gate", "up")
        ]
        self._gate_up = load_linear(weights, projections, hidden_size, bias)
        self._down = load_partial_linear(
            weights, f"{name}.down_proj", intermediate_size, hidden_size, bias, partition
        )

    def __call__(self, x_TC: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        return self._down(self._silu_and_mul(self._gate_up(x_TC)))


class GatedMLP:
    """x_TC -> down(silu(gate(x)) * up(x))."""

    def __init__(
        self, build: BuildContext, name: str, intermediate_size: int, bias: bool = False
    ) -> None:
        self._partial = PartialMLP(build, name, intermediate_size, bias)
        self._peers = build.peers

    def __call__(self, x_TC: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        return self._peers.sum_(self._partial(x_TC))
