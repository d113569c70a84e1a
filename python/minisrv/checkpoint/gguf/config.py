"""The metadata of GGUF files in the terms of config.json and generation_config.json.

As for config.json, what changes the results and is not implemented is refused by name: every key
below the name of the architecture must be one that is read here, or have a value without effect.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from minisrv.checkpoint.gguf.reading import GgufCheckpoint, open_gguf
from minisrv.checkpoint.gguf.vocabulary import end_ids, token_id
from minisrv.checkpoint.model_config import (
    Dtype,
    ModelConfig,
    PackedConfig,
    make_model_config,
)
from minisrv.errors import ConfigError, UnsupportedModelError

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
PLAIN_KINDS = frozenset({"F32", "F16", "BF16"})
PACKED_KINDS = frozenset(
    {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)
_MAX_CONTEXT = 1 << 24
_READ_KEYS = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_weights_norm",
}
# Without effect, with any value or with these.
_IGNORED_KEYS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "expert_gating_func": (1,),  # softmax
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "pooling_type": (0,),
    "leading_dense_block_count": (0,),
}
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Hints that are not used, and the value with which they change nothing.
_UNUSED_SAMPLING = {"sequence": "", "xtc_probability": 0.0, "penalty_last_n": -1, "mirostat": 0}
ROPE_FACTORS = "rope_freqs.weight"


def load_gguf_config(path: Path, max_seq_len: int | None) -> ModelConfig:
    """The model in GGUF files. `max_seq_len` is the context to serve; None is the model's.

    Raises ConfigError for files that cannot be used or a context beyond the model's, and
    UnsupportedModelError for a model or a type of tensors that minisrv does not implement.
    """
    checkpoint = open_gguf(path)
    reader = _Reader(checkpoint)
    reader.check_keys()
    _check_kinds(checkpoint)
    sampling, unused = reader.sampling()
    raw = reader.config()
    if ends := end_ids(checkpoint):
        raw["eos_token_id"] = ends
    try:
        config = make_model_config(raw, sampling, max_seq_len)
    except ConfigError as error:
        message = error.message.replace("config.json", checkpoint.name)
        raise type(error)(message) from error
    reader.check_window(config.max_seq_len)
    rope = config.rope
    if factors := reader.rope_factors(config.head_dim):
        if rope.rope_type != "default":
            raise UnsupportedModelError(
                f"{checkpoint.name} has {ROPE_FACTORS} and rope.scaling.type {rope.rope_type!r}; "
                "minisrv implements only one of them at a time"
            )
        rope = replace(rope, rope_type="factors", factors=factors)
    return replace(
        config,
        rope=rope,
        qkv_bias=reader.has("attn_q.bias"),
        o_bias=reader.has("attn_output.bias"),
        mlp_bias=reader.has("ffn_gate.bias"),
        packed=_packed(checkpoint),
        sampling_source=checkpoint.name,
        unapplied_defaults=(*config.unapplied_defaults, *unused),
    )


class _Reader:
    """The values of one model, most of them under the name of its architecture."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        """Raises UnsupportedModelError for an architecture that is not implemented."""
        self._checkpoint = checkpoint
        architecture = checkpoint.get("general.architecture", str)
        if architecture not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"{checkpoint.name} has the architecture {architecture!r}; minisrv supports "
                f"{', '.join(_ARCHITECTURES)} (Mistral models are of llama)"
            )
        self._architecture = architecture

    def check_keys(self) -> None:
        """Refuse keys that may change the results."""
        for key in self._checkpoint.keys:
            part = key.removeprefix(f"{self._architecture}.")
            if part == key or part in _READ_KEYS | _IGNORED_KEYS:
                continue
            if self._checkpoint.value(key) not in _NEUTRAL.get(part, ()):
                raise UnsupportedModelError(
                    f"{self._checkpoint.name} has {key}, which minisrv does not implement"
                )

    def check_window(self, max_seq_len: int) -> None:
        """Refuse a sliding window that is shorter than the context."""
        window = self._count("attention.sliding_window", 0)
        if 0 < window < max_seq_len:
            raise UnsupportedModelError(
                f"the model attends to a sliding window of {window} tokens, shorter than the "
                f"context of {max_seq_len}; run with --max-seq-len {window} or less"
            )

    def has(self, part: str) -> bool:
        """Whether the layers have this tensor."""
        return f"blk.0.{part}" in self._checkpoint.tensors

    def config(self) -> dict[str, Any]:
        """The entries of a config.json, without the end tokens."""
        tensors = self._checkpoint.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ConfigError(f"{self._checkpoint.name} has no weights: no token_embd.weight")
        layers, heads = self._count("block_count"), self._count("attention.head_count")
        hidden_size = self._count("embedding_length")
        if layers > len(tensors):
            raise ConfigError(
                f"{self._checkpoint.name} has {layers} layers, but only {len(tensors)} tensors"
            )
        head_dim = self._count("attention.key_length", hidden_size // max(1, heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if (length := self._count(key, head_dim)) != head_dim:
                raise UnsupportedModelError(
                    f"{self._checkpoint.name} has {key} {length} and heads of {head_dim}; minisrv "
                    "supports only equal ones"
                )
        context = self._count("context_length")
        if context > _MAX_CONTEXT:
            raise ConfigError(f"{self._checkpoint.name} has the absurd context_length {context}")
        return {
            "architectures": [_ARCHITECTURES[self._architecture]],
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": context,
            "rms_norm_eps": self._positive("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(context),
            "tie_word_embeddings": "output.weight" not in tensors,
            "dtype": _dtype(self._checkpoint),
            "bos_token_id": token_id(self._checkpoint, "bos"),
            **self._experts(layers),
        }

    def _experts(self, layers: int) -> dict[str, Any]:
        num_experts = self._count("expert_count", 0)
        if self._architecture != "qwen3moe":
            if num_experts:
                raise UnsupportedModelError(
                    f"{self._checkpoint.name} has {num_experts} experts, which minisrv implements "
                    "only for qwen3moe"
                )
            return {}
        norm = self._checkpoint.get("qwen3moe.expert_weights_norm", bool)
        return {
            "num_experts": num_experts,
            "num_experts_per_tok": self._count("expert_used_count"),
            "moe_intermediate_size": self._count("expert_feed_forward_length"),
            "norm_topk_prob": norm is not False,
            "mlp_only_layers": [
                i
                for i in range(layers)
                if f"blk.{i}.ffn_gate_inp.weight" not in self._checkpoint.tensors
            ],
        }

    def _rope(self, context: int) -> dict[str, Any]:
        theta = {"rope_theta": self._positive("rope.freq_base", 10000.0)}
        kind = self._checkpoint.get(f"{self._architecture}.rope.scaling.type", str) or "none"
        factor = self._positive("rope.scaling.factor", self._positive("rope.scale_linear", 1.0))
        if kind == "none":
            kind = "none" if factor == 1.0 else "linear"
        match kind:
            case "none":
                return theta
            case "linear":
                return {**theta, "rope_type": "linear", "factor": factor}
            case "yarn":
                original = self._count("rope.scaling.original_context_length", context)
                optional = {
                    "attention_factor": "rope.scaling.yarn_attn_factor",
                    "beta_fast": "rope.scaling.yarn_beta_fast",
                    "beta_slow": "rope.scaling.yarn_beta_slow",
                }
                given = {name: self._number(key) for name, key in optional.items()}
                return {
                    **theta,
                    "rope_type": "yarn",
                    "factor": factor,
                    "original_max_position_embeddings": original,
                    **{name: value for name, value in given.items() if value is not None},
                }
        raise UnsupportedModelError(
            f"{self._checkpoint.name} has rope.scaling.type {kind!r}; minisrv supports none, "
            "linear, yarn, and Llama 3's factors"
        )

    def rope_factors(self, head_dim: int) -> tuple[float, ...]:
        """What the frequency of each pair of a head is divided by, for Llama 3; else empty.

        Raises UnsupportedModelError for factors of LongRoPE.
        """
        tensors = self._checkpoint.tensors
        if long := next((name for name in tensors if "rope_factors_" in name), None):
            raise UnsupportedModelError(
                f"{self._checkpoint.name} has {long} (LongRoPE), which minisrv does not implement"
            )
        tensor = tensors.get(ROPE_FACTORS)
        if tensor is None:
            return ()
        if tensor.kind.name != "F32" or tensor.shape != (head_dim // 2,):
            raise ConfigError(
                f"{self._checkpoint.name} has {ROPE_FACTORS} of {tensor.kind.name} and shape "
                f"{list(tensor.shape)}; it must be of F32 and shape [{head_dim // 2}]"
            )
        factors = self._checkpoint.data(ROPE_FACTORS).view(np.float32).flatten()
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise ConfigError(f"{self._checkpoint.name} has {ROPE_FACTORS} that are not positive")
        return tuple(factors.tolist())

    def sampling(self) -> tuple[dict[str, Any], list[str]]:
        """The entries of a generation_config.json, and a phrase for each hint that is not used."""
        values = {}
        for key, name in _SAMPLING.items():
            values[name] = self._checkpoint.value(f"general.sampling.{key}")
        unused = []
        for key, neutral in _UNUSED_SAMPLING.items():
            value = self._checkpoint.value(f"general.sampling.{key}")
            if value not in (None, neutral):
                unused.append(f"{key}={str(value)[:60]}")
        return {name: value for name, value in values.items() if value is not None}, unused

    def _count(self, key: str, default: int | None = None) -> int:
        """A number of something; of an array of one per layer, if they are equal, theirs."""
        full = f"{self._architecture}.{key}"
        value = self._checkpoint.value(full)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModelError(
                    f"{self._checkpoint.name} has a {full} that differs between layers, which "
                    "minisrv does not implement"
                )
            value = value[0]
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self._checkpoint.name} lacks {full}")
        if type(value) is not int or value < (default != 0):
            raise ConfigError(f"{self._checkpoint.name} has {full} {value!r}; it must be positive")
        return value

    def _number(self, key: str) -> float | None:
        value = self._checkpoint.get(f"{self._architecture}.{key}", float)
        if value is not None and not isfinite(value):
            raise ConfigError(f"{self._checkpoint.name} has {key} {value}")
        return value

    def _positive(self, key: str, default: float | None = None) -> float:
        value = self._number(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self._checkpoint.name} lacks {self._architecture}.{key}")
        if value <= 0:
            raise ConfigError(f"{self._checkpoint.name} has {key} {value}; it must be positive")
        return value


def _check_kinds(checkpoint: GgufCheckpoint) -> None:
    refused = {
        name: tensor.kind.name
        for name, tensor in checkpoint.tensors.items()
        if tensor.kind.name not in PLAIN_KINDS | PACKED_KINDS
    }
    if refused:
        kinds = ", ".join(sorted(set(refused.values())))
        raise UnsupportedModelError(
            f"{checkpoint.name} has {len(refused)} tensors of type {kinds}, such as "
            f"{next(iter(refused))}, which minisrv does not read; use a file with Q8_0, Q4_0, "
            "Q4_K_M, Q5_K_M or Q6_K"
        )


def _dtype(checkpoint: GgufCheckpoint) -> Dtype:
    """float32 or float16 if all matrices are; bfloat16 also for quantized ones."""
    kinds = {t.kind.name for t in checkpoint.tensors.values() if len(t.shape) > 1}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32"} else "bfloat16"


def _packed(checkpoint: GgufCheckpoint) -> PackedConfig | None:
    packed = [t for t in checkpoint.tensors.values() if t.kind.name in PACKED_KINDS]
    if not packed:
        return None
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    return PackedConfig(tuple(sorted({tensor.kind.name for tensor in packed})), total)
