"""Llama 3 and Mistral: the plain decoder."""

from __future__ import annotations

from minisrv.engine.layers.attention import SelfAttention
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.decoder import Block
from minisrv.engine.layers.mlp import GatedMLP


def llama_block(build: BuildContext, name: str, layer_id: int) -> Block:
    """Attention and a gated feed-forward layer, with biases if the config has them."""
    config = build.config
    attention = SelfAttention(build, f"{name}.self_attn", layer_id)
    mlp = GatedMLP(build, f"{name}.mlp", config.intermediate_size, config.mlp_bias)
    return Block(build, name, attention, mlp)
