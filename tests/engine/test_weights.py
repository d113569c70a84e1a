"""Checkpoint files: whole, sharded, tied, and everything that may be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.errors import ConfigError
from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import load_reference, reference_tokens
from tests.support.step_driver import StepDriver, open_engine

PROMPT = list(range(40, 80))
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Add, replace or (None) drop tensors of a checkpoint; `__` in a name stands for a dot."""
    tensors = load_file(path / FILE)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / FILE)


def text(path: Path) -> list[int]:
    return StepDriver(open_engine(path)).generate(PROMPT, 8)


def test_shards_give_the_text_of_one_file(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "qwen3")
    sharded = make_checkpoint(tmp_path / "sharded", "qwen3", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert text(sharded) == text(whole)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    shard = max(path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} does not exist"):
        open_engine(path)


def test_a_tensor_of_two_files_comes_from_the_last_as_in_transformers_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    name = "model.norm.weight"
    last = max(path.glob("*.safetensors"))
    tensors = load_file(last)
    before = text(path)
    changed = next(load_file(p)[name] for p in path.glob("*.safetensors") if name in load_file(p))
    first = min(path.glob("*.safetensors"))
    save_file({**load_file(first), name: -changed}, first)
    save_file({**tensors, name: changed}, last)
    with caplog.at_level("WARNING"):
        assert text(path) == before
    assert f"have {name}; those in the last file are used" in caplog.text
    save_file({**tensors, name: -changed}, last)
    assert text(path) == reference_tokens(load_reference(path), [PROMPT])[0][:8] != before


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "[" * 100_000),
        *('{"weight_map": {"a": 3}}', '{"weight_map": 1}', '{"weight_map": {}}'),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    path = make_checkpoint(tmp_path, "llama")
    (path / INDEX).write_text(content)
    with pytest.raises(ConfigError, match="is not a valid safetensors index"):
        open_engine(path)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", "llama")
    (path / FILE).rename(tmp_path / FILE)
    (path / INDEX).write_text(json.dumps({"weight_map": {"a": f"../{FILE}"}}))
    with pytest.raises(ConfigError, match="which is not the name of a file"):
        open_engine(path)


def test_missing_and_unexpected_tensors_are_named_up_to_five(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    extra = {f"extra{i}": torch.zeros(1) for i in range(7)}
    edit(path, model__norm__weight=None, **extra)
    message = r"lacks model\.norm\.weight and has unexpected extra0, .*extra4 and 2 more"
    with pytest.raises(ConfigError, match=message):
        open_engine(path)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    edit(path, model__norm__weight=torch.ones(63))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \[63\].*\[64\]"):
        open_engine(path)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    edit(path, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has dtype torch\.int8"):
        open_engine(path)


def test_stored_rotary_frequencies_and_a_tied_head_are_accepted(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    before = text(path)
    edit(
        path,
        lm_head__weight=load_file(path / FILE)["model.embed_tokens.weight"].clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
    )
    assert text(path) == before


def test_a_tied_head_with_values_of_its_own_is_used_as_in_transformers(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    tied = text(path)
    table = load_file(path / FILE)["model.embed_tokens.weight"]
    edit(path, lm_head__weight=table.roll(1, 0).contiguous())
    own = text(path)
    assert own != tied
    assert own == reference_tokens(load_reference(path), [PROMPT])[0][:8]
    edit(path, lm_head__weight=torch.ones(3, 4))
    with pytest.raises(ConfigError, match=r"lm_head.weight has shape \[3, 4\]"):
        open_engine(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="not a valid safetensors file"):
        open_engine(path)


def test_a_checkpoint_without_safetensors_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    (path / FILE).rename(path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only as .bin or .pt files.*safetensors"):
        open_engine(path)


def test_the_type_comes_from_the_file_when_the_config_has_none(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    engine = open_engine(path)
    driver = StepDriver(engine)
    batch = driver.batch(prefills=[(driver.add(), PROMPT)])
    assert engine.placement.startswith("bfloat16")
    assert engine.compute_logits(batch).dtype is torch.float32


def test_the_type_option_overrides_the_checkpoint(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    driver = StepDriver(open_engine(path, dtype="bfloat16"))
    batch = driver.batch(prefills=[(driver.add(), PROMPT)])
    assert driver.engine.placement.startswith("bfloat16")
    assert driver.engine.compute_logits(batch).dtype is torch.float32


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    seen: list[tuple[object, ...]] = []
    config = ServerConfig(model=str(path), num_threads=1, max_running_requests=2)
    Engine(config, path, load_model_config(path), lambda *step: seen.append(step))
    loading = [step[1:] for step in seen if step[0] == "load weights"]
    fractions = [fraction for fraction, *_ in loading]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5
    assert fractions[-1] == 1.0
    size = (path / "model.safetensors").stat().st_size
    assert {tuple(amount) for _, *amount in loading} == {(size, "B")}
