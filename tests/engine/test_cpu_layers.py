"""The layers of a decode step in one call compute what they compute one operator at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minisrv import LLM, SamplingParams
from minisrv.engine.engine import Engine
from minisrv.engine.kernels.compiler import find_compiler
from minisrv.engine.layers.decoder import Decoder
from tests.support.checkpoints import make_checkpoint
from tests.support.gguf_files import Kind, write_gguf
from tests.support.oracle import make_prompts

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
MIXED: dict[str, Any] = {"vocab_size": 385}  # matrices of several types side by side
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)


def decoder_of(llm: LLM) -> Decoder:
    engine = llm._loop.engine
    assert isinstance(engine, Engine)
    return engine._rank_0.runner._model


def outputs(llm: LLM, prompts: list[list[int]], at_once: int) -> list[Any]:
    """Tokens and log-probabilities, bit by bit."""
    found = []
    for i in range(0, len(prompts), at_once):
        batch = llm.generate_outputs(prompts[i : i + at_once], PARAMS, use_tqdm=False)
        found += [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in batch]
    return found


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("llama", {"vocab_size": 387}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", MIXED),
    ],
    ids=["llama", "qwen2", "qwen3", "mixed"],
)
def test_results_are_bit_for_bit_those_of_the_single_operators(
    architecture: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path, architecture, **variant)
    if variant is MIXED:
        kinds = {"attn_v.weight": Kind.Q8_0, "ffn_up.weight": Kind.Q5_1}
        model = write_gguf(model, tmp_path / "mixed.gguf", Kind.Q4_0, others=kinds)
    options: dict[str, Any] = {} if variant is MIXED else {"quantization": "int8"}
    prompts = make_prompts(8, 300, longest=90)
    prompts += [prompts[1] * 7 + [i] for i in range(4)]  # a shared prefix of more than 512 tokens
    used: Counter[bool] = Counter()
    found = []
    for joined in (True, False):
        with LLM(str(model), num_threads=2, radix_cache=False, **options) as llm:
            decoder = decoder_of(llm)
            run = decoder.run_layers
            assert run is not None

            def count(*arguments: Any, run: Any = run) -> bool:
                used[done := run(*arguments)] += 1
                return bool(done)

            decoder.run_layers = count if joined else None
            found.append([outputs(llm, prompts, at_once) for at_once in (1, 4)])
    assert found[0] == found[1]
    assert used[True] > 50
    assert used[False] > 10


def test_sparse_layers_and_plain_weights_are_computed_one_by_one(tmp_path: Path) -> None:
    sparse = make_checkpoint(tmp_path / "sparse", "qwen3_moe")
    dense = make_checkpoint(tmp_path / "dense", "qwen3")
    for model_dir, quantization in ((sparse, "int8"), (dense, "none")):
        with LLM(str(model_dir), quantization=quantization, num_threads=1, num_pages=1000) as llm:
            assert decoder_of(llm).run_layers is None
