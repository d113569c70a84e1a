"""Rotary parameters in every spelling of config.json, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minisrv.checkpoint.model_config import load_model_config
from minisrv.engine.layers.rope import attention_factor, inverse_frequencies
from minisrv.errors import ConfigError
from tests.checkpoint.test_model_config import LLAMA, QWEN3_MOE

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
DEEPSEEK = {**YARN, "attn_factor": 0.8782488562869419, "beta_fast": 32, "beta_slow": 1}
SPELLINGS: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_theta": 1e6}},
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    {"rope_scaling": {**LINEAR, "type": "yarn"}},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_scaling": LLAMA3, "rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_theta": 5e5},
    {"rope_scaling": {**YARN, "rope_theta": 2e5}, "rope_parameters": LLAMA3},
    {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 1e6}},
    {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 1e6}},
    {"rope_scaling": DEEPSEEK, "rope_theta": 1e6},
    {"rope_scaling": {**YARN, "finetuned": True, "attention_factor": 1.25}},
    {"rope_scaling": {**LINEAR, "finetuned": True, "low_freq_factor": 3.0}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 128},
    {"rope_scaling": {**LLAMA3, "attention_factor": 3.0}},
    {"dtype": "float16", "torch_dtype": "bfloat16"},
    {"torch_dtype": "bfloat16"},
    {"head_dim": 32},
]


def write(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


@pytest.mark.parametrize("spelling", SPELLINGS, ids=json.dumps)
def test_a_spelling_is_read_as_transformers_reads_it(
    tmp_path: Path, spelling: dict[str, Any]
) -> None:
    write(tmp_path, {**LLAMA, **spelling})
    ours, theirs = load_model_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    rotary = LlamaRotaryEmbedding(theirs)
    frequencies = inverse_frequencies(ours.rope, ours.head_dim)
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(ours.rope) == pytest.approx(rotary.attention_scaling)
    assert ours.head_dim == theirs.head_dim
    if theirs.dtype is not None:
        assert f"torch.{ours.dtype}" == str(theirs.dtype)


@pytest.mark.parametrize(
    ("spelling", "notes"),
    [
        ({"rope_scaling": YARN}, []),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR}, []),
        (
            {"rope_scaling": LINEAR, "rope_parameters": YARN},
            ["of rope_parameters and rope_scaling the latter is used"],
        ),
        ({"rope_scaling": DEEPSEEK}, ["ignored rope parameters, as in transformers: attn_factor"]),
        (
            {"rope_scaling": {**LINEAR, "finetuned": True, "attn_factor": 1.0}},
            ["attn_factor, finetuned"],
        ),
    ],
    ids=str,
)
def test_what_is_ignored_is_named_in_one_line(
    tmp_path: Path, spelling: dict[str, Any], notes: list[str]
) -> None:
    found = load_model_config(write(tmp_path, {**LLAMA, **spelling})).notes
    assert len(found) == len(notes)
    assert all(note in line for note, line in zip(notes, found, strict=True))


def test_two_numbers_of_experts_that_differ_are_refused(tmp_path: Path) -> None:
    assert load_model_config(write(tmp_path, {**QWEN3_MOE, "num_local_experts": 8})).moe
    with pytest.raises(ConfigError, match="num_local_experts"):
        load_model_config(write(tmp_path, {**QWEN3_MOE, "num_local_experts": 4}))
