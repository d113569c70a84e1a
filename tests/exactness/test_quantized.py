"""Rounded weights: the tokens are those of transformers on the dequantized model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisrv.engine.packed import can_round, round_int4, round_int8
from tests.exactness.test_tensor_parallel import WAY, parallel_loop
from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import compare, load_reference, make_prompts, reference_tokens, run

ENDS = ("embed_tokens.weight", "lm_head.weight")


def dequantize(model_dir: Path, to: Path, quantization: str) -> Path:
    """The same checkpoint with the numbers that the rounded weights stand for."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        weight = parameter.data
        if weight.dim() == 3:  # transformers stacks the experts
            parameter.data = torch.stack(
                [_rounded(name, expert, quantization) for expert in weight]
            )
        elif weight.dim() == 2 and not name.endswith("mlp.gate.weight"):
            parameter.data = _rounded(name, weight, quantization)
    model.save_pretrained(to)
    return to


def _rounded(name: str, weight: torch.Tensor, quantization: str) -> torch.Tensor:
    if not can_round(weight):
        return weight
    in_int8 = quantization == "int8" or name.endswith(ENDS)
    return (round_int8 if in_int8 else round_int4)(weight).dequantized()


MODELS: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("llama", {}, 1, None),
    ("qwen2", {"tie_word_embeddings": True}, 1, None),
    ("qwen2", {"tie_word_embeddings": True, "vocab_size": 387}, 2, None),
    ("qwen3", {}, 2, "int4"),
    ("qwen3_moe", {}, 1, "int8"),
]


@pytest.mark.parametrize(
    ("architecture", "variant", "tp", "quantization"),
    [
        pytest.param(*model, quantization, marks=[] if quantization == quick else pytest.mark.soak)
        for *model, quick in MODELS
        for quantization in ("int8", "int4")
    ],
)
def test_tokens_are_those_of_the_dequantized_model(
    tmp_path: Path, architecture: str, variant: dict[str, Any], tp: int, quantization: str
) -> None:
    model_dir = make_checkpoint(tmp_path / "plain", architecture, **variant)
    model = load_reference(dequantize(model_dir, tmp_path / "dequantized", quantization))
    prompts = make_prompts(12, model.config.vocab_size, longest=200)
    expected = reference_tokens(model, prompts)
    plain = reference_tokens(load_reference(model_dir), prompts[:4])
    assert plain != expected[:4]
    options = {"kernels": "torch", "quantization": quantization, "num_pages": 2500}
    with parallel_loop(model_dir, tp, **options) as loop:
        assert f"{quantization} weights" in loop.engine.placement
        outputs, _ = run(loop, prompts, WAY.at_once)
    assert not compare(model, prompts, expected, outputs)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_kernels_text_is_the_same_in_any_company(tmp_path: Path, quantization: str) -> None:
    """Alone or in a batch, with a cold cache or a warm one."""
    model_dir = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    prompts = make_prompts(12, vocab_size, longest=200)
    with parallel_loop(model_dir, 1, quantization=quantization, num_pages=2500) as loop:
        alone, _ = run(loop, prompts, 1)
        together, _ = run(loop, prompts, 12)
    assert together == alone
