"""Self-attention: the projections; the attention itself is done by a backend."""

# Shapes: T tokens in the step, C hidden size, H query heads, K key-value heads, D head size.

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from minisrv.engine.kernels.base import NormWeight, Product, QKNormWeights, RopeRows
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import (
    Projection,
    has_joined,
    load_linear,
    load_row_parallel_linear,
)
from minisrv.engine.parallel.shard import rows_of_heads

# x_TC, rope_rows; changes x_TC in place.
AddAttention = Callable[[Tensor, RopeRows], None]


class SelfAttention:
    """x_TC -> a new tensor [T, C]: causal attention over the cached context, projected."""

    def __init__(
        self, build: BuildContext, name: str, layer_id: int, *, qk_norm: bool = False
    ) -> None:
        config, weights = build.config, build.weights
        self._layer_id, self._kernels, self._backend = layer_id, build.kernels, build.backend
        self._communicator, sharding = build.communicator, build.communicator.sharding
        head_dim = self._head_dim = config.head_dim
        q_heads, kv_heads = sharding.query_heads(config), sharding.kv_heads(config)
        self._heads = [q_heads.length, kv_heads.length, kv_heads.length]
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        projections = [
            Projection(f"{name}.q_proj", q_size, rows_of_heads(q_heads, head_dim)),
            Projection(f"{name}.k_proj", kv_size, rows_of_heads(kv_heads, head_dim)),
            Projection(f"{name}.v_proj", kv_size, rows_of_heads(kv_heads, head_dim)),
        ]
        self._qkv = load_linear(
            weights, build.kernels, projections, config.hidden_size, config.qkv_bias
        )
        self._out = load_row_parallel_linear(
            weights,
            build.kernels,
            f"{name}.o_proj",
            q_size,
            config.hidden_size,
            config.o_bias,
            sharding,
        )
        self._norm = _load_qk_norm(build, name) if qk_norm else None

    def __call__(self, x_TC: Tensor, rope_rows: RopeRows) -> Tensor:
        num_tokens = x_TC.shape[0]
        qkv_TAD = self._qkv(x_TC).view(num_tokens, -1, self._head_dim)
        cache = self._backend.cache_slots(self._layer_id)
        self._kernels.norm_rotate_store_(qkv_TAD, self._heads[0], self._norm, rope_rows, cache)
        out_THD = self._attend(qkv_TAD)
        return self._communicator.all_reduce(self._out(out_THD.view(num_tokens, -1)))

    def joined(self, norm: NormWeight) -> AddAttention | None:
        """The attention of a few tokens behind this norm, added to the tokens themselves.

        None if the kernels do not have it, or for several ranks.
        """
        small, qkv, out = self._kernels.small_batch, self._qkv, self._out
        if small is None or self._communicator.sharding.size > 1:
            return None
        if not (has_joined(qkv, small) and has_joined(out, small)):
            return None

        def add(x_TC: Tensor, rope_rows: RopeRows) -> None:
            cache = self._backend.cache_slots(self._layer_id)
            qkv_TAD = small.project_heads(
                x_TC, norm, qkv, self._heads[0], self._norm, rope_rows, cache
            )
            out_THD = self._attend(qkv_TAD)
            small.add_product_(out_THD.view(x_TC.shape[0], -1), out, x_TC)

        return add

    def dense_parts(self) -> tuple[Product, tuple[int, int, int], QKNormWeights | None, Product]:
        """The fields `qkv`, `heads`, `qk_norm` and `out` of a DenseLayer."""
        heads = (self._heads[0], self._heads[1], self._head_dim)
        return self._qkv, heads, self._norm, self._out

    def _attend(self, qkv_TAD: Tensor) -> Tensor:
        q_THD, k_TKD, v_TKD = qkv_TAD.split_with_sizes(self._heads, 1)
        return self._backend.forward(q_THD, k_TKD, v_TKD, self._layer_id)


def _load_qk_norm(build: BuildContext, name: str) -> QKNormWeights:
    shape = (build.config.head_dim,)
    q_D = build.weights.load_tensor(f"{name}.q_norm.weight", shape)
    k_D = build.weights.load_tensor(f"{name}.k_norm.weight", shape)
    return QKNormWeights(q_D, k_D, build.config.norm_eps)
