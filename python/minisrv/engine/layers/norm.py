"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from torch import Tensor

from minisrv.engine.kernels.base import NormWeight
from minisrv.engine.layers.build_context import BuildContext


class RMSNorm:
    """x_TC -> a new tensor [T, C], normalised and scaled. Adds `delta` to x_TC in place first."""

    def __init__(self, build: BuildContext, name: str) -> None:
        w_C = build.weights.load_tensor(f"{name}.weight", (build.config.hidden_size,))
        self.weight = NormWeight(w_C, build.config.norm_eps)
        self._kernels = build.kernels

    def __call__(self, x_TC: Tensor, delta: Tensor | None = None) -> Tensor:
        return self._kernels.add_rms_norm_(x_TC, delta, self.weight.w_C, self.weight.eps)
