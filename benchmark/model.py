"""The models of the benchmarks: Qwen3 with random weights in bfloat16, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"


TINY = Qwen3Config(
    vocab_size=32_000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=40_960,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=True,
)


def make_model(folder: Path, shape: Path | None = None) -> Path:
    """Write the checkpoint to `folder`, unless it exists already; returns `folder`.

    `shape` is a folder with a Qwen3 config.json; without it, the model has 14.5 M weights.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    config = Qwen3Config.from_pretrained(shape) if shape else TINY
    config.bos_token_id = None
    config.eos_token_id = config.pad_token_id = config.vocab_size - 1
    config.dtype = "bfloat16"
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _make_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def _make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Bytes first, then filler words: the benchmarks send ids and only need text back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"word{i}" for i in range(len(alphabet), vocab_size - 1))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert json.loads(tokenizer.to_str())["added_tokens"][0]["id"] == vocab_size - 1
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
