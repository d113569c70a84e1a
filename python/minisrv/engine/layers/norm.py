"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from torch import Tensor

from minisrv.engine.layers.build_context import BuildContext


class RMSNorm:
    """x_TC -> a new tensor [T, C], normalised and scaled. Adds `delta` to x_TC in place first."""

    def __init__(self, build: BuildContext, name: str) -> None:
        self._weight = build.weights.load_tensor(f"{name}.weight", (build.config.hidden_size,))
        self._kernels, self._eps = build.kernels, build.config.norm_eps

    def __call__(self, x_TC: Tensor, delta: Tensor | None = None) -> Tensor:
        return self._kernels.add_rms_norm_(x_TC, delta, self._weight, self._eps)
