"""Which tokens end a text, by the files of a checkpoint and the classes of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from minisrv import LLM, SamplingParams
from minisrv.checkpoint.end_tokens import add_end_token
from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.sampling_params import TokenBias
from tests.support import own_tokenizers
from tests.support.checkpoints import EOS_ID, make_checkpoint

TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
REQUIRED = {
    "hidden_size": 4096,
    "intermediate_size": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "vocab_size": 380,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def write(path: Path, model_type: str = "llama", **changes: Any) -> Path:
    config = {"architectures": [TYPES[model_type]], "model_type": model_type, **REQUIRED, **changes}
    (path / "config.json").write_text(json.dumps(config | (MOE if "moe" in model_type else {})))
    return path


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": None}])
@pytest.mark.parametrize("model_type", TYPES)
def test_what_a_config_leaves_out_is_as_the_class_in_transformers_has_it(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    path = write(tmp_path, model_type, **changes)
    ours, theirs = load_model_config(path, 100), AutoConfig.from_pretrained(path)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,))
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or 4096 // 32
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def end_tokens(path: Path, eos_token: str = "</s>", **changes: Any) -> ModelConfig:
    own_tokenizers.save(path, "byte_level_bpe", eos_token=eos_token)
    write(path, **changes)
    return add_end_token(load_model_config(path, 100), load_tokenizer(path))


def test_config_and_tokenizer_that_agree_need_no_note(tmp_path: Path) -> None:
    for changes in ({"eos_token_id": 2}, {}, {"eos_token_id": [3, 2]}):
        model = end_tokens(tmp_path, **changes)
        assert 2 in model.eos_token_ids
        assert model.notes == ()


def test_where_they_disagree_both_end_a_text_and_the_note_names_them(tmp_path: Path) -> None:
    model = end_tokens(tmp_path, "<pad>", eos_token_id=2)
    assert model.eos_token_ids == (2, 3)
    (note,) = model.notes
    assert "</s> (2) by the configuration and <pad> (3) by the tokenizer" in note
    model = end_tokens(tmp_path, "<pad>", eos_token_id=None)
    assert model.eos_token_ids == (3,)
    assert "no end token in the configuration; the tokenizer's, <pad> (3)" in model.notes[0]


def test_an_assumed_end_token_that_is_text_ends_nothing(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")  # its token 2 is "#"
    config = json.loads((path / "config.json").read_text())
    del config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").unlink()
    assert load_model_config(path).eos_token_ids == (2,)
    fields = {"max_tokens": 4, "temperature": 0.0}
    with LLM(path, dtype="float32", num_threads=1, num_pages=50) as llm:
        assert llm.model_config.eos_token_ids == (EOS_ID,)
        for token_id, count in ((2, 4), (EOS_ID, 1)):
            params = SamplingParams(logit_bias=(TokenBias(token_id, 100.0),), **fields)
            (output,) = llm.generate_outputs([[5, 6]], params, use_tqdm=False)
            assert output.outputs[0].token_ids == [token_id] * count
