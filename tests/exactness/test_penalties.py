"""Penalties and biases in whole texts: transformers' model and processors say what comes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, RepetitionPenaltyLogitsProcessor

from minisrv.llm import LLM
from minisrv.sampling_params import SamplingParams, TokenBias
from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import load_reference, make_prompts

COUNT = 24
CASES = [
    SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, **fields)
    for fields in (
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.5},
        {"logit_bias": (TokenBias(65, 100.0),), "frequency_penalty": 2.0},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0, "repetition_penalty": 0.7},
        {},
    )
]


def expected_tokens(
    model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams
) -> list[int]:
    repetition = RepetitionPenaltyLogitsProcessor(params.repetition_penalty or 1.0)
    output: list[int] = []
    for _ in range(COUNT):
        ids = torch.tensor([[*prompt, *output]])
        with torch.inference_mode():
            logits = model(ids).logits[:, -1].float()
        logits = repetition(ids, logits)[0]
        for token in set(output):
            logits[token] -= params.presence_penalty
            logits[token] -= params.frequency_penalty * output.count(token)
        for bias in params.logit_bias:
            logits[bias.token_id] += bias.value
        output.append(int(logits.argmax()))
    return output


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_greedy_texts_are_those_of_the_oracle_with_chunks_and_retractions(
    tmp_path: Path, overlap_depth: int
) -> None:
    model_dir = make_checkpoint(tmp_path, "qwen3")
    model = load_reference(model_dir)
    prompts = make_prompts(12, model.config.vocab_size, longest=60)
    params = [CASES[i % len(CASES)] for i in range(len(prompts))]
    expected = [expected_tokens(model, p, q) for p, q in zip(prompts, params, strict=True)]
    plain = expected_tokens(model, prompts[0], CASES[-1])
    assert expected[0] != plain  # the penalty changes something
    options = {"page_size": 4, "num_pages": 48, "max_prefill_tokens": 16}
    with LLM(
        model_dir, dtype="float32", num_threads=1, overlap_depth=overlap_depth, **options
    ) as llm:
        outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
        assert llm._loop.scheduler.num_preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_the_models_own_repetition_penalty_holds_for_requests_without_one(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "qwen3")
    model = load_reference(model_dir)
    own = {"repetition_penalty": 1.8, "do_sample": False}
    (model_dir / "generation_config.json").write_text(json.dumps(own))
    prompt, *_ = make_prompts(1, model.config.vocab_size, longest=60)
    penalised, plain = (expected_tokens(model, prompt, CASES[i]) for i in (0, -1))
    assert penalised != plain
    left_open = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    told = replace(CASES[-1], repetition_penalty=1.0)
    for kind, params, expected in (
        ("model", left_open, penalised),
        ("model", told, plain),
        ("openai", CASES[-1], plain),
    ):
        with LLM(model_dir, "float32", num_threads=1, num_pages=100, sampling_defaults=kind) as llm:
            (output,) = llm.generate_outputs([prompt], params, use_tqdm=False)
        assert output.outputs[0].token_ids == expected, kind


def test_a_seeded_draw_with_penalties_is_the_same_alone_in_a_crowd_and_with_two_ranks() -> None:
    params = SamplingParams(
        temperature=1.2, seed=5, max_tokens=24, presence_penalty=1.0, repetition_penalty=1.2
    )
    texts = []
    for tp, prompts in ((1, ["Count"]), (1, ["Count", "Hi", "Who"]), (2, ["Count", "Hi"])):
        with LLM("demo", dtype="float32", tp=tp, num_threads=1, kv_memory="64MiB") as llm:
            texts.append(llm.generate(prompts, params, use_tqdm=False)[0])
    assert texts[0] == texts[1] == texts[2]


def test_a_seeded_draw_with_penalties_is_the_same_after_a_retraction(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "llama")
    prompts = make_prompts(12, load_reference(model_dir).config.vocab_size, longest=60)
    params = SamplingParams(
        temperature=1.0, seed=9, max_tokens=COUNT, ignore_eos=True, frequency_penalty=1.0
    )
    texts, preemptions = [], []
    for num_pages in (48, 1000):
        with LLM(
            model_dir, dtype="float32", num_threads=1, page_size=4, num_pages=num_pages
        ) as llm:
            outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
            preemptions.append(llm._loop.scheduler.num_preemptions)
        texts.append([output.outputs[0].token_ids for output in outputs])
    assert preemptions[0] > 0 == preemptions[1]
    assert texts[0] == texts[1]
