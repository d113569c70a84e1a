"""Architecture names as in config.json, and the function that builds a layer of each."""

from __future__ import annotations

from collections.abc import Callable

from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.decoder import Block
from minisrv.engine.models.llama import llama_block
from minisrv.engine.models.qwen3 import qwen3_block

# Qwen2 is the plain decoder with `qkv_bias`.
BLOCKS: dict[str, Callable[[BuildContext, str, int], Block]] = {
    "LlamaForCausalLM": llama_block,
    "MistralForCausalLM": llama_block,
    "Qwen2ForCausalLM": llama_block,
    "Qwen3ForCausalLM": qwen3_block,
    "Qwen3MoeForCausalLM": qwen3_block,
}
