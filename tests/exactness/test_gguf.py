"""GGUF files give the tokens of transformers on the original, or on the dequantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.exactness.test_tensor_parallel import WAY, parallel_loop
from tests.support.checkpoints import make_checkpoint
from tests.support.gguf_files import Kind, dequantized_checkpoint, split_gguf, write_gguf
from tests.support.oracle import (
    CHECKPOINTS,
    PAIRWISE,
    compare,
    load_reference,
    make_loop,
    make_prompts,
    reference_tokens,
    run,
)

# llama.cpp normalises the scores of qwen3moe's experts, so its files come from such models.
MOE = {"norm_topk_prob": True, "moe_intermediate_size": 64}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tokens_are_those_of_the_original(name: str, tmp_path: Path) -> None:
    architecture, variant = CHECKPOINTS[name]
    moe = MOE if architecture == "qwen3_moe" else {}
    original = make_checkpoint(tmp_path / "original", architecture, **variant, **moe)
    path = write_gguf(original, tmp_path / "model.gguf")
    model = load_reference(original)
    # The others differ from one of these in the rotation of the positions only.
    first_of_its_kind = name in ("llama", "qwen2-tied", "qwen3", "qwen3-moe")
    prompts = make_prompts(12 if first_of_its_kind else 4, model.config.vocab_size, longest=300)
    expected = reference_tokens(model, prompts)
    for way in PAIRWISE[: 2 if first_of_its_kind else 1]:
        outputs, _ = run(make_loop(path, way), prompts, way.at_once)
        assert not compare(model, prompts, expected, outputs)


QUANTIZED: list[tuple[str, dict[str, Any], int, set[Kind]]] = [
    ("llama", {"vocab_size": 387}, 2, {Kind.Q8_0}),
    ("qwen2", {"tie_word_embeddings": True}, 1, {Kind.Q4_0, Kind.Q4_1, Kind.Q5_0}),
    ("qwen3_moe", MOE, 1, {Kind.Q5_1}),
]


@pytest.mark.parametrize(
    ("architecture", "variant", "tp", "kind"),
    [
        pytest.param(
            *(architecture, variant, tp, kind),
            id=f"{architecture}-{kind.name}",
            marks=[] if kind in quick else pytest.mark.soak,
        )
        for architecture, variant, tp, quick in QUANTIZED
        for kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
    ],
)
def test_tokens_of_a_quantized_file_are_those_of_the_dequantized_model(
    architecture: str, variant: dict[str, Any], tp: int, kind: Kind, tmp_path: Path
) -> None:
    original = make_checkpoint(tmp_path / "original", architecture, **variant)
    path = write_gguf(original, tmp_path / "model.gguf", kind)
    model = load_reference(dequantized_checkpoint(original, tmp_path / "rounded", kind))
    prompts = make_prompts(12, model.config.vocab_size, longest=200)
    expected = reference_tokens(model, prompts)
    assert expected[:4] != reference_tokens(load_reference(original), prompts[:4])
    split_gguf(path, tmp_path, 3)
    parts = tmp_path / "model-00001-of-00003.gguf"
    for one in (path, parts) if tp == 1 else (parts,):
        with parallel_loop(one, tp, kernels="torch", num_pages=2500) as loop:
            assert f", {kind.name}" in loop.engine.placement
            outputs, _ = run(loop, prompts, WAY.at_once)
        assert not compare(model, prompts, expected, outputs)
