"""Self-attention: projections here, keys and values in the backend's pages."""

# Shapes: T tokens in the step, C hidden size, H query heads, K key-value heads, D head size.

from __future__ import annotations

from torch import Tensor

from minisrv.engine.kernels.base import QKNormWeights, RopeRows
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import load_linear


class SelfAttention:
    """x_TC -> the output projection of causal attention over the cached context."""

    def __init__(
        self, build: BuildContext, name: str, layer_id: int, *, qk_norm: bool = False
    ) -> None:
        config, weights = build.config, build.weights
        self._layer_id, self._kernels, self._backend = layer_id, build.kernels, build.backend
        self._num_heads, self._head_dim = config.num_heads, config.head_dim
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        sizes = [heads * config.head_dim for heads in self._heads]
        names = [f"{name}.{part}_proj" for part in "qkv"]
        self._qkv = load_linear(weights, names, config.hidden_size, sizes, config.qkv_bias)
        self._out = load_linear(
            weights, [f"{name}.o_proj"], sizes[0], [config.hidden_size], config.o_bias
        )
        self._norm = _load_qk_norm(build, name) if qk_norm else None

    def __call__(self, x_TC: Tensor, rope_rows: RopeRows) -> Tensor:
        """A new tensor [T, C]."""
        num_tokens = x_TC.shape[0]
        qkv_TAD = self._qkv(x_TC).view(num_tokens, -1, self._head_dim)
        cache = self._backend.cache_slots(self._layer_id)
        self._kernels.norm_rotate_store_(qkv_TAD, self._num_heads, self._norm, rope_rows, cache)
        q_THD, k_TKD, v_TKD = qkv_TAD.split_with_sizes(self._heads, 1)
        out_THD = self._backend.forward(q_THD, k_TKD, v_TKD, self._layer_id)
        return self._out(out_THD.view(num_tokens, -1))


def _load_qk_norm(build: BuildContext, name: str) -> QKNormWeights:
    shape = (build.config.head_dim,)
    q_D = build.weights.take(f"{name}.q_norm.weight", shape)
    k_D = build.weights.take(f"{name}.k_norm.weight", shape)
    return QKNormWeights(q_D, k_D, build.config.norm_eps)
