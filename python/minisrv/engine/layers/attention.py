"""Self-attention: projections and rotation here, keys and values in the backend's pages."""

# Shapes: T tokens in the step, C hidden size, H query heads, K key-value heads, D head size.

from __future__ import annotations

from torch import Tensor

from minisrv.engine.attention.base import AttentionBackend
from minisrv.engine.layers.linear import load_linear
from minisrv.engine.layers.norm import QKNorm
from minisrv.engine.layers.rope import RotaryEmbedding
from minisrv.engine.weights import Weights
from minisrv.model_config import ModelConfig


class SelfAttention:
    """x_TC -> the output projection of causal attention over the cached context."""

    def __init__(
        self,
        weights: Weights,
        name: str,
        config: ModelConfig,
        layer_id: int,
        rope: RotaryEmbedding,
        backend: AttentionBackend,
        *,
        qk_norm: bool = False,
    ) -> None:
        self._layer_id, self._rope, self._backend = layer_id, rope, backend
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        self._q_and_k = [num_heads, num_kv_heads]
        self._qk_and_v = [num_heads + num_kv_heads, num_kv_heads]
        self._head_dim = config.head_dim
        q_size, kv_size = num_heads * config.head_dim, num_kv_heads * config.head_dim
        names = [f"{name}.{part}_proj" for part in "qkv"]
        self._qkv = load_linear(
            weights, names, config.hidden_size, [q_size, kv_size, kv_size], config.qkv_bias
        )
        self._out = load_linear(
            weights, [f"{name}.o_proj"], q_size, [config.hidden_size], config.o_bias
        )
        self._qk_norm = (
            QKNorm(weights, name, config.head_dim, num_heads, num_kv_heads, config.norm_eps)
            if qk_norm
            else None
        )

    def __call__(self, x_TC: Tensor, rope_rows: tuple[Tensor, Tensor]) -> Tensor:
        """A new tensor [T, C]."""
        num_tokens = x_TC.shape[0]
        qkv_THD = self._qkv(x_TC).view(num_tokens, -1, self._head_dim)
        qk_THD, v_TKD = qkv_THD.split_with_sizes(self._qk_and_v, 1)
        if self._qk_norm is not None:
            qk_THD = self._qk_norm(qk_THD)
        self._rope.rotate_(qk_THD, rope_rows)
        q_THD, k_TKD = qk_THD.split_with_sizes(self._q_and_k, 1)
        out_THD = self._backend.forward(q_THD, k_TKD, v_TKD, self._layer_id)
        return self._out(out_THD.view(num_tokens, -1))
