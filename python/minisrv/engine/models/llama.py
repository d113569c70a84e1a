"""Llama 3 and Mistral: the plain decoder."""

from __future__ import annotations

from minisrv.engine.layers.attention import SelfAttention
from minisrv.engine.layers.decoder import Block, BuildContext
from minisrv.engine.layers.mlp import GatedMLP


def llama_block(build: BuildContext, name: str, layer_id: int) -> Block:
    """Attention and a gated feed-forward layer, with the biases that the config asks for."""
    config, weights = build.config, build.weights
    attention = SelfAttention(
        weights, f"{name}.self_attn", config, layer_id, build.rope, build.backend
    )
    mlp = GatedMLP(
        weights, f"{name}.mlp", config.hidden_size, config.intermediate_size, config.mlp_bias
    )
    return Block(build, name, attention, mlp)
