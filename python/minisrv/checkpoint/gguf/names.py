"""The names that GGUF files give to the tensors of our architectures.

Files of the architecture `llama` hold the rows of the query and key matrices in another order:
their rotary embedding turns neighbours, (0, 1), (2, 3), ..., ours the two halves of a head.
"""

from __future__ import annotations

import re

_OUTSIDE_LAYERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
_TURNED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")


def gguf_name(name: str) -> tuple[str, int | None]:
    """A tensor of the model in the file: its name there, and the expert if it holds all of them."""
    part, _, suffix = name.rpartition(".")
    if part in _OUTSIDE_LAYERS:
        return f"{_OUTSIDE_LAYERS[part]}.{suffix}", None
    layer = _LAYER.fullmatch(part)
    assert layer is not None, name
    if expert := _EXPERT.fullmatch(layer[2]):
        return f"blk.{layer[1]}.ffn_{expert[2]}_exps.{suffix}", int(expert[1])
    return f"blk.{layer[1]}.{_IN_LAYERS[layer[2]]}.{suffix}", None


def turns_neighbours(architecture: str, name: str) -> bool:
    """Whether the rows of this tensor of the file are in the order of neighbours."""
    return architecture == "llama" and _TURNED.fullmatch(name) is not None
