"""Small checkpoints with random weights in real architectures, made with transformers.

The weights are scaled so that greedy text says something: the best token wins by a clear margin,
texts vary, and an early prompt token matters to what follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 384
EOS_ID = 256
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": EOS_ID,
    "tie_word_embeddings": False,
}
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def make_checkpoint(
    path: Path,
    arch: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **variant: Any,
) -> Path:
    """Write a model and its tokenizer to `path`; `variant` overrides fields of the config."""
    model = make_model(arch, seed=seed, **variant).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def make_model(arch: str, *, seed: int = 0, **variant: Any) -> PreTrainedModel:
    """The model of a checkpoint, in float32."""
    config_type, fields = _CONFIGS[arch]
    config = config_type(**{**_SHAPE, **fields, **variant})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            _scale(name, parameter.data)
    return model


def _scale(name: str, weight: torch.Tensor) -> None:
    if name.endswith("norm.weight"):
        weight.uniform_(0.7, 1.3)
    elif name.endswith(".bias"):
        weight.normal_(0, 0.3)
    elif "embed_tokens" in name or "lm_head" in name:
        weight.normal_(0, 1.0 if "embed" in name else 0.4)
    else:
        gain = 2.5 if "q_proj" in name or "k_proj" in name else 1.5
        weight.normal_(0, gain / weight.shape[-1] ** 0.5)


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A token a byte, the special tokens from `EOS_ID` on, and words of filler up to the size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    specials = len(SPECIAL_TOKENS)
    vocab |= {token: EOS_ID + i for i, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {f"<filler{i}>": i for i in range(EOS_ID + specials, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
    )
