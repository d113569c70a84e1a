"""The shapes that the dry run covers, as checkpoints that consist of a config.json.

Models named "switches" run with the options that are off by default, and others with the kernel for
decodes after which they are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from minisrv.checkpoint.model_config import ModelConfig, load_model_config

_BASE = Path(__file__).parents[2] / "benchmark" / "models" / "Qwen3-0.6B" / "config.json"
_FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
_FP8_ROWS = {"quant_method": "fbgemm_fp8"}


@dataclass(frozen=True)
class Model:
    """`fields` differ from those of Qwen3-0.6B; `options` are server options."""

    name: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_a_repetition(self) -> bool:
        """Whether it differs from another one only in its sizes, or joins what two others have."""
        return self.name in _REPETITIONS

    @cached_property
    def num_layers(self) -> int:
        return int({**_base_fields(), **self.fields}["num_hidden_layers"])

    def write(self, folder: Path, num_layers: int | None = None) -> Path:
        """A directory with this model's config.json, with fewer layers if `num_layers` says so."""
        layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
        path = folder / f"{self.name}-{num_layers or 'all'}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(
            json.dumps({**_base_fields(), **self.fields, **layers}, indent=1)
        )
        return path

    def config(self, folder: Path, max_seq_len: int) -> ModelConfig:
        """As the server reads it."""
        return load_model_config(self.write(folder), max_seq_len)


def _base_fields() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(_BASE.read_text())
    return fields


def _dense(hidden: int, intermediate: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
    }


_8B = _dense(4096, 12288, 32, 36)
_30B_A3B = {
    **_dense(2048, 6144, 32, 48),
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_SWITCHES = {"joined_kernels": True, "programmatic_launch": True, "cuda_graph_max_tokens": 512}
_REPETITIONS = {
    *("Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-14B-switches", "Qwen3-30B-A3B-switches"),
    *("Qwen3-0.6B-FP8-cache-switches", "Qwen3-30B-A3B-cuda-core", "Qwen3-0.6B-cuda-core-switches"),
    *("Qwen3-14B-xqa", "Qwen3-30B-A3B-xqa", "Qwen3-0.6B-FP8-cache-xqa", "Qwen3-0.6B-xqa-switches"),
}
MODELS = {
    model.name: model
    for model in (
        Model("Qwen3-0.6B", {}),
        Model("Qwen3-8B", _8B),
        Model("Qwen3-14B", _dense(5120, 17408, 40, 40)),
        Model("Qwen3-32B", _dense(5120, 25600, 64, 64)),
        Model("Qwen3-30B-A3B", _30B_A3B),
        Model("Qwen3-8B-FP8-blocks", {**_8B, "quantization_config": _FP8_BLOCKS}),
        Model("Qwen3-8B-FP8-rows", {**_8B, "quantization_config": _FP8_ROWS}),
        Model("Qwen3-0.6B-FP8-cache", {}, {"kv_cache_dtype": "fp8"}),
        Model("Qwen3-0.6B-switches", {}, _SWITCHES),
        Model("Qwen3-14B-switches", _dense(5120, 17408, 40, 40), _SWITCHES),
        Model("Qwen3-30B-A3B-switches", _30B_A3B, _SWITCHES),
        Model("Qwen3-0.6B-FP8-cache-switches", {}, {"kv_cache_dtype": "fp8", **_SWITCHES}),
        Model("Qwen3-0.6B-cuda-core", {}, {"decode_kernel": "cuda_core"}),
        Model("Qwen3-30B-A3B-cuda-core", _30B_A3B, {"decode_kernel": "cuda_core"}),
        Model("Qwen3-0.6B-xqa", {}, {"decode_kernel": "xqa"}),
        Model("Qwen3-14B-xqa", _dense(5120, 17408, 40, 40), {"decode_kernel": "xqa"}),
        Model("Qwen3-30B-A3B-xqa", _30B_A3B, {"decode_kernel": "xqa"}),
        Model("Qwen3-0.6B-FP8-cache-xqa", {}, {"kv_cache_dtype": "fp8", "decode_kernel": "xqa"}),
        Model("Qwen3-0.6B-xqa-switches", {}, {"decode_kernel": "xqa", **_SWITCHES}),
        Model("Qwen3-0.6B-cuda-core-switches", {}, {"decode_kernel": "cuda_core", **_SWITCHES}),
    )
}
