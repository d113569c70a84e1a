"""Qwen3 and Qwen3-MoE: query and key heads are normalised; MoE models have sparse layers."""

from __future__ import annotations

from minisrv.engine.layers.attention import SelfAttention
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.decoder import Block, FeedForward
from minisrv.engine.layers.mlp import GatedMLP
from minisrv.engine.layers.moe import SparseMoe


def qwen3_block(build: BuildContext, name: str, layer_id: int) -> Block:
    """Attention with normalised heads, and a dense or sparse feed-forward layer."""
    attention = SelfAttention(build, f"{name}.self_attn", layer_id, qk_norm=True)
    return Block(build, name, attention, _feed_forward(build, f"{name}.mlp", layer_id))


def _feed_forward(build: BuildContext, name: str, layer_id: int) -> FeedForward:
    config = build.config
    if config.moe is not None and layer_id in config.moe.sparse_layers:
        return SparseMoe(build, name, config.moe)
    return GatedMLP(build, name, config.intermediate_size, config.mlp_bias)
