"""The metadata of GGUF files as the config of a model: equal to config.json's, or refused."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from minisrv.checkpoint.gguf.config import PACKED_KINDS, PLAIN_KINDS
from minisrv.checkpoint.gguf.files import find_gguf
from minisrv.checkpoint.model_config import ModelConfig, PackedConfig, load_model_config
from minisrv.engine.gguf_packed import KINDS
from minisrv.engine.layers.rope import inverse_frequencies
from minisrv.errors import ConfigError, UnsupportedModelError
from minisrv.sampling_params import SamplingParams
from tests.support.checkpoints import EOS_ID, make_checkpoint
from tests.support.gguf_files import Kind, write_gguf
from tests.support.oracle import CHECKPOINTS

IM_END = 258


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def load(llama: Path, path: Path, metadata: dict[str, Any], **options: Any) -> ModelConfig:
    return load_model_config(write_gguf(llama, path / "model.gguf", metadata=metadata), **options)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_config_equals_that_of_the_original(name: str, tmp_path: Path) -> None:
    arch, variant = CHECKPOINTS[name]
    original = make_checkpoint(tmp_path / "original", arch, norm_topk_prob=True, **variant)
    ours = load_model_config(write_gguf(original, tmp_path / "model.gguf"))
    theirs = load_model_config(original)
    frequencies = [inverse_frequencies(one.rope, one.head_dim) for one in (ours, theirs)]
    torch.testing.assert_close(*frequencies, rtol=1e-6, atol=0)
    same_rope = theirs.rope.rope_type != "llama3"
    expected = replace(
        theirs,
        architecture=theirs.architecture.replace("Mistral", "Llama"),
        rope=theirs.rope if same_rope else ours.rope,
        eos_token_ids=(EOS_ID, IM_END),
        sampling_source="model.gguf",
    )
    differing = [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(expected, f.name)]
    assert not differing, {
        name: (getattr(ours, name), getattr(expected, name)) for name in differing
    }


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, "float32"),
        (Kind.F16, "float16"),
        (Kind.BF16, "bfloat16"),
        (Kind.Q8_0, "bfloat16"),
    ],
)
def test_the_dtype_is_that_of_the_matrices(
    kind: Kind, dtype: str, llama: Path, tmp_path: Path
) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", kind)
    config = load_model_config(path)
    assert config.dtype == dtype
    packed = None if kind is not Kind.Q8_0 else PackedConfig(("Q8_0",), _data_bytes(path))
    assert config.packed == packed


def _data_bytes(path: Path) -> int:
    return sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)


def test_every_type_that_is_read_is_packed_or_plain() -> None:
    assert {kind.name for kind in KINDS} == PACKED_KINDS
    assert not PLAIN_KINDS & PACKED_KINDS


def test_sampling_hints_are_the_defaults_of_requests(llama: Path, tmp_path: Path) -> None:
    hints = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1}
    hints |= {"mirostat": 2, "penalty_last_n": -1}
    config = load(llama, tmp_path, {f"general.sampling.{key}": v for key, v in hints.items()})
    assert config.sampling_defaults == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1
    )
    assert config.unapplied_defaults == ("mirostat=2",)


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        ({}, (EOS_ID, IM_END)),
        ({"tokenizer.ggml.eot_token_id": 7}, (EOS_ID, 7, IM_END)),
        ({"tokenizer.ggml.eos_token_id": IM_END}, (IM_END, EOS_ID)),
    ],
)
def test_end_tokens_are_those_named_and_those_known(
    metadata: dict[str, Any], ends: tuple[int, ...], llama: Path, tmp_path: Path
) -> None:
    assert load(llama, tmp_path, metadata).eos_token_ids == ends


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma3"}, "architecture 'gemma3'; minisrv supports llama"),
        ({"general.architecture": None}, "architecture None"),
        ({"llama.attention.temperature_scale": 0.5}, "llama.attention.temperature_scale"),
        ({"llama.attention.causal": False}, "llama.attention.causal"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8 and heads of 16"),
        ({"llama.expert_count": 8}, "8 experts"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "differs between layers"),
        ({"llama.attention.sliding_window": 512}, "sliding window of 512.*--max-seq-len 512"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    metadata: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load(llama, tmp_path, metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "model.gguf lacks llama.block_count"),
        ({"llama.block_count": 1 << 30}, "1073741824 layers, but only"),
        ({"llama.context_length": 1 << 30}, "absurd context_length 1073741824"),
        ({"llama.attention.head_count": 0}, "head_count 0; it must be positive"),
        ({"llama.attention.head_count": 3}, "model.gguf has 3 attention heads, not a multiple"),
        ({"llama.attention.head_count": "four"}, "head_count 'four'"),
        ({"llama.rope.freq_base": -1.0}, "rope.freq_base -1.0; it must be positive"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "384 tokens, but 2 types"),
    ],
)
def test_metadata_that_is_wrong_is_an_error_that_names_it(
    metadata: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(llama, tmp_path, metadata)


def test_equal_numbers_for_each_layer_are_one(llama: Path, tmp_path: Path) -> None:
    config = load(llama, tmp_path, {"llama.attention.head_count_kv": [2, 2, 2]})
    assert config.num_kv_heads == 2


def test_a_window_as_long_as_the_served_context_changes_nothing(
    llama: Path, tmp_path: Path
) -> None:
    config = load(llama, tmp_path, {"llama.attention.sliding_window": 512}, max_seq_len=512)
    assert config.max_seq_len == 512


def test_a_type_that_is_not_read_is_refused_with_an_alternative(
    llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 17), np.uint8), raw_dtype=Kind.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"type MXFP4, such as blk.0.ffn_up.*Q4_K_M"):
        load_model_config(path)


def test_a_vocabulary_is_not_a_model(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf", tensors=False)
    with pytest.raises(ConfigError, match=r"no weights: no token_embd.weight"):
        load_model_config(path)


def test_a_directory_with_one_gguf_model_is_that_model(llama: Path, tmp_path: Path) -> None:
    path = write_gguf(llama, tmp_path / "model.gguf")
    assert find_gguf(tmp_path) == (path,)
    assert load_model_config(tmp_path) == load_model_config(path)
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match=r"several GGUF models: model.gguf, other.gguf; name one"):
        load_model_config(tmp_path)


def test_safetensors_come_before_gguf_in_a_directory(llama: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(llama, both)
    write_gguf(llama, both / "model.gguf")
    assert find_gguf(both) == ()
