"""The gated feed-forward layer (Shazeer, 2020)."""

# Shapes: T tokens in the step, C hidden size, F intermediate size.

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from minisrv.engine.kernels.base import NormWeight
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import (
    Projection,
    has_joined,
    load_linear,
    load_row_parallel_linear,
)


class PartialMLP:
    """x_TC -> down(silu(gate(x)) * up(x)) over this rank's features, before all_reduce."""

    def __init__(
        self, build: BuildContext, name: str, intermediate_size: int, bias: bool = False
    ) -> None:
        hidden_size, weights = build.config.hidden_size, build.weights
        sharding = build.communicator.sharding
        self._kernels, self.intermediate_size = build.kernels, intermediate_size
        shard = sharding.even_shard(intermediate_size, 0)
        projections = [
            Projection(f"{name}.{part}_proj", intermediate_size, shard) for part in ("gate", "up")
        ]
        self.gate_up = load_linear(weights, build.kernels, projections, hidden_size, bias)
        self.down = load_row_parallel_linear(
            weights,
            build.kernels,
            f"{name}.down_proj",
            intermediate_size,
            hidden_size,
            bias,
            sharding,
        )

    def __call__(self, x_TC: Tensor) -> Tensor:
        return self.down(self._kernels.silu_and_mul(self.gate_up(x_TC)))

    def joined(self, norm: NormWeight) -> Callable[[Tensor], None] | None:
        small, gate_up, down = self._kernels.small_batch, self.gate_up, self.down
        if small is None or not (has_joined(gate_up, small) and has_joined(down, small)):
            return None

        def add(x_TC: Tensor) -> None:
            small.add_product_(small.gate_and_up(x_TC, norm, gate_up), down, x_TC)

        return add


class GatedMLP:
    """x_TC -> a new tensor [T, C]: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, build: BuildContext, name: str, intermediate_size: int, bias: bool = False
    ) -> None:
        self.partial = PartialMLP(build, name, intermediate_size, bias)
        self._communicator = build.communicator

    def __call__(self, x_TC: Tensor) -> Tensor:
        return self._communicator.all_reduce(self.partial(x_TC))

    def joined(self, norm: NormWeight) -> Callable[[Tensor], None] | None:
        """For a few tokens: adds the result for the normed x_TC to x_TC in place.

        None if the kernels do not have it, or for several ranks.
        """
        if self._communicator.sharding.size > 1:
            return None
        return self.partial.joined(norm)
