"""Configs of checkpoints: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minisrv.checkpoint.model_config import ModelConfig, RopeConfig, load_model_config
from minisrv.errors import ConfigError, UnsupportedModelError
from minisrv.sampling_params import SamplingParams

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3_MOE = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def load(
    path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None = None,
    max_seq_len: int | None = None,
) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return load_model_config(path, max_seq_len)


def test_a_plain_config_is_read(tmp_path: Path) -> None:
    config = load(tmp_path, {**LLAMA, "dtype": "bfloat16", "tie_word_embeddings": True})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.max_position, config.max_seq_len) == (1024, 1024)
    assert config.dtype == "bfloat16"
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id == 1
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False)


def test_the_older_and_the_newer_form_of_rope_are_read_alike(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    newer = {
        **LLAMA,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling},
    }
    assert load(tmp_path, older) == load(tmp_path, newer)
    assert load(tmp_path, newer).rope == RopeConfig(
        rope_type="llama3",
        theta=5e5,
        factor=8.0,
        original_max_position=256,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def test_yarn_extends_the_context_and_linear_does_not(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert load(tmp_path, {**LLAMA, "rope_scaling": yarn}).max_seq_len == 4096
    linear = {"rope_type": "linear", "factor": 4.0}
    assert load(tmp_path, {**LLAMA, "rope_scaling": linear}).max_seq_len == 1024


def test_max_seq_len_shortens_the_context_and_cannot_lengthen_it(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, max_seq_len=100).max_seq_len == 100
    with pytest.raises(ConfigError, match="--max-seq-len is 1025; the model's context is 1024"):
        load(tmp_path, LLAMA, max_seq_len=1025)


def test_end_tokens_and_sampling_come_from_the_generation_config_first(tmp_path: Path) -> None:
    generation = {
        "eos_token_id": [7, 9, 7],
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
    }
    config = load(tmp_path, LLAMA, generation)
    assert config.eos_token_ids == (7, 9)
    assert config.bos_token_id == 1
    defaults = config.sampling_defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 0.95)
    assert defaults.min_p is None
    assert defaults.repetition_penalty == 1.05
    assert config.unapplied_defaults == ()
    assert config.defaults_of("model") == defaults
    assert config.defaults_of("openai") == SamplingParams()


@pytest.mark.parametrize(
    ("generation", "unused"),
    [
        ({"temperature": 2.5}, "temperature is 2.5; it must be in [0, 2]"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be in [0, 2]"),
        ({"top_p": 0}, "top_p is 0; it must be in (0, 1]"),
        ({"top_p": 0.0, "do_sample": False}, "top_p is 0.0; it must be in (0, 1]"),
        ({"top_k": 50.5}, "top_k is 50.5; it must be an integer"),
        ({"top_k": True}, "top_k is True; it must be an integer"),
        ({"repetition_penalty": 10**400}, "repetition_penalty is an integer of 1329 bits"),
        ({"stop_strings": ["###"]}, "stop_strings=['###']"),
        ({"min_new_tokens": 5}, "min_new_tokens=5"),
        ({"max_new_tokens": 2048}, "max_new_tokens=2048"),
        ({"typical_p": 0.9}, "typical_p=0.9"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_used_of_a_generation_config_is_named_with_the_reason(
    tmp_path: Path, generation: dict[str, Any], unused: str
) -> None:
    config = load(tmp_path, LLAMA, {"min_p": 0.1, **generation})
    assert len(config.unapplied_defaults) == 1
    assert config.unapplied_defaults[0].startswith(unused)
    assert config.sampling_defaults.min_p == 0.1
    assert config.defaults_of("openai") == SamplingParams()
    assert config.sampling_defaults.with_defaults(SamplingParams()).top_p == 1.0


def test_a_top_k_that_is_written_as_a_float_is_used(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA, {"top_k": 50.0, "stop_strings": [], "min_new_tokens": None})
    assert config.sampling_defaults.top_k == 50
    assert config.unapplied_defaults == ()


def test_a_model_that_does_not_sample_is_greedy_by_default(tmp_path: Path) -> None:
    generation = {"do_sample": False, "temperature": 0.7}
    assert load(tmp_path, LLAMA, generation).sampling_defaults.temperature == 0.0


def test_biases_follow_the_architecture(tmp_path: Path) -> None:
    def biases(name: str, **extra: Any) -> tuple[bool, bool, bool]:
        config = load(tmp_path, {**LLAMA, "architectures": [name], **extra})
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases("LlamaForCausalLM", attention_bias=True, mlp_bias=True) == (True, True, True)
    assert biases("MistralForCausalLM", sliding_window=None, attention_bias=True) == (False,) * 3
    assert biases("Qwen2ForCausalLM") == (True, False, False)
    assert biases("Qwen3ForCausalLM", attention_bias=True, mlp_bias=True) == (True, True, False)


def test_sparse_layers_follow_the_step_and_the_dense_list(tmp_path: Path) -> None:
    moe = load(tmp_path, {**QWEN3_MOE, "norm_topk_prob": True}).moe
    assert moe is not None
    assert moe.sparse_layers == {0, 1, 2}
    assert moe.norm_topk_prob
    stepped = load(tmp_path, {**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [0]}).moe
    assert stepped is not None
    assert stepped.sparse_layers == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"architectures": None}, r"\(none\)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq.*unquantized"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "--max-seq-len 1024"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"layer_types": ["full_attention", "mamba"]}, "mamba"),
        ({"dtype": "float64"}, "float64"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 256},
            "window of 256.*--max-seq-len 256",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 128,
                "max_window_layers": 2,
            },
            "--max-seq-len 128",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path, {**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "max_seq_len"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 256}, 256),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
    ],
)
def test_the_option_that_a_refusal_names_makes_it_run(
    tmp_path: Path, changes: dict[str, Any], max_seq_len: int
) -> None:
    assert load(tmp_path, {**LLAMA, **changes}, max_seq_len=max_seq_len).max_seq_len == max_seq_len


def test_a_window_that_no_layer_uses_is_ignored(tmp_path: Path) -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}
    assert load(tmp_path, {**qwen, "use_sliding_window": False}).max_seq_len == 1024
    unused = {**qwen, "use_sliding_window": True, "max_window_layers": 3}
    assert load(tmp_path, unused).max_seq_len == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"vocab_size": "many"}, "vocab_size 'many'"),
        ({"num_key_value_heads": 3}, "4 attention heads, not a multiple of its 3"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks its factor"),
    ],
)
def test_a_wrong_config_is_refused_with_its_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {**LLAMA, **changes})


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
        load_model_config(tmp_path)
