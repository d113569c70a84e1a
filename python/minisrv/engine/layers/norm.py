"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minisrv.engine.weights import Weights


class RMSNorm:
    """Normalise the last dimension and scale it."""

    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        self._weight = weights.take(f"{name}.weight", (size,))
        self._shape, self._eps = (size,), eps

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor like `x`."""
        return F.rms_norm(x, self._shape, self._weight, self._eps)


class QKNorm:
    """Normalise each query and key head, queries with one weight and keys with another."""

    def __init__(
        self,
        weights: Weights,
        name: str,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        q_D = weights.take(f"{name}.q_norm.weight", (head_dim,))
        k_D = weights.take(f"{name}.k_norm.weight", (head_dim,))
        heads = [q_D.expand(num_heads, head_dim), k_D.expand(num_kv_heads, head_dim)]
        self._weight = q_D.new_empty(num_heads + num_kv_heads, head_dim)
        self._weight[:num_heads], self._weight[num_heads:] = heads
        self._shape, self._eps = (head_dim,), eps

    def __call__(self, qk_THD: Tensor) -> Tensor:
        """A new tensor; the heads are num_heads of queries, then num_kv_heads of keys."""
        return F.rms_norm(qk_THD, self._shape, None, self._eps).mul_(self._weight)
