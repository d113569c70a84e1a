"""Sampled texts of random checkpoints, token by token, and their distribution, by the oracle."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minisrv.llm import LLM
from minisrv.sampling_params import SamplingParams, TokenBias
from tests.support.checkpoints import EOS_ID, make_checkpoint
from tests.support.oracle import load_reference, make_prompts
from tests.support.sampled_oracle import adjusted_logits, check_tokens, probabilities

BASE = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
ALONE: list[dict[str, Any]] = [
    {"temperature": 0.4},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 9},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.3},
    {"min_p": 0.02},
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 2.0},
    {"presence_penalty": -1.5},
    {"frequency_penalty": 1.7},
    {"frequency_penalty": -0.6},
    {"logit_bias": tuple(TokenBias(i, 9.0 if i % 2 else -100.0) for i in range(0, 200, 5))},
    {"min_tokens": 20, "stop_token_ids": tuple(range(0, 384, 2))},
]
# Numbers that are others, or zero, as the 32-bit floats that the engine computes with.
EXTREME: list[dict[str, Any]] = [
    *({"temperature": t} for t in (5e-324, 1e-46, 1e-45, 1e-40, 1e-30, 1e-6, 2 - 1e-9)),
    *({"top_p": p} for p in (1e-45, 1e-40, 1e-30, 1e-9, math.nextafter(1, 0), 1 - 1e-9)),
    *({"min_p": p} for p in (5e-324, 1e-46, 1e-40, 1e-9, 1 - 1e-9, math.nextafter(1, 0), 1)),
    *({"repetition_penalty": r} for r in (1e-6, 1e-3, math.nextafter(1, 0), 1 + 1e-12, 2.0)),
    *({"presence_penalty": p} for p in (5e-324, -1e-46, 1e-12, -2.0, 2.0)),
    *({"frequency_penalty": p} for p in (5e-324, -1e-46, 1e-12, -2.0, 2.0)),
    *({"logit_bias": (TokenBias(3, b),)} for b in (5e-324, -1e-46, 1e39, -1.7e308)),
    *({"top_k": k} for k in (1, 383, 384, 2**31 - 1)),
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_pages": 1000}


def combined(seed: int, fields_of: Sequence[dict[str, Any]] = ALONE) -> dict[str, Any]:
    """Some of the fields, one value for each."""
    rng = random.Random(seed)
    chosen: dict[str, Any] = {}
    for fields in rng.sample(fields_of, rng.randint(2, 9)):
        chosen.update(fields)
    return chosen


def params_of(fields: dict[str, Any], seed: int) -> SamplingParams:
    greedy = {"temperature": 0.0} if seed % 5 == 0 else {}
    return replace(BASE, seed=seed, **(fields | greedy))


def check_texts(model_dir: Path, params: Sequence[SamplingParams], **options: Any) -> None:
    model = load_reference(model_dir)
    prompts = make_prompts(len(params), model.config.vocab_size, longest=60)
    with LLM(model_dir, **OPTIONS, **options) as llm:
        outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
    for i, (prompt, output, p) in enumerate(zip(prompts, outputs, params, strict=True)):
        for choice in output.outputs:
            try:
                check_tokens(model, prompt, choice.token_ids, p, choice.index, [EOS_ID])
            except AssertionError as error:
                raise AssertionError(f"request {i}, {p}: {error}") from error


@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(a, marks=pytest.mark.soak) for a in ("mistral", "qwen2", "qwen3"))],
)
def test_each_token_is_drawn_after_transformers_processors_in_the_stated_order(
    tmp_path: Path, architecture: str
) -> None:
    fields = [*ALONE, *map(combined, range(60))]
    params = [params_of(f, seed) for seed, f in enumerate(fields, 1)]
    check_texts(make_checkpoint(tmp_path, architecture), params, max_prefill_tokens=50)


def test_each_token_of_extreme_numbers_is_the_one_of_the_exact_processors(tmp_path: Path) -> None:
    fields = [*EXTREME, *(combined(seed, EXTREME) for seed in range(40))]
    params = [replace(BASE, seed=seed, **f) for seed, f in enumerate(fields, 1)]
    check_texts(make_checkpoint(tmp_path, "llama"), params)


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_many_combinations(tmp_path: Path, architecture: str) -> None:
    model_dir = make_checkpoint(tmp_path, architecture, seed=5)
    params = [params_of(combined(seed), seed) for seed in range(1, 3000)]
    check_texts(model_dir, params, overlap_depth=1)


NUM_SEEDS = 24
PAIRS: list[dict[str, Any]] = [
    {"top_k": 4, "temperature": 1.5},
    {"top_k": 5, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"top_p": 0.7, "top_k": 8, "repetition_penalty": 1.3},
    {"min_p": 0.1, "frequency_penalty": -2.0, "logit_bias": (TokenBias(7, 6.0),)},
    {
        "temperature": 1.7,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 0.8,
        "presence_penalty": -1.0,
        "logit_bias": (TokenBias(3, 5.0), TokenBias(4, 5.0)),
    },
]


def pair_probabilities(
    model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams
) -> dict[tuple[int, int], float]:
    """Of all pairs of first tokens that may come."""

    def after(output: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *output]])).logits[0, -1]
        probs = probabilities(adjusted_logits(logits, prompt, output, params), params)
        return {i: float(probs[i]) for i in probs.nonzero().flatten().tolist()}

    first = after([])
    return {(a, b): p * q for a, p in first.items() for b, q in after([a]).items()}


@pytest.mark.parametrize(
    "fields",
    [
        *(pytest.param(fields, marks=pytest.mark.soak) for fields in PAIRS[:-2]),
        *PAIRS[-2:],
    ],
    ids=str,
)
def test_pairs_of_tokens_come_as_often_as_they_should(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    """A chi-square test; seeds and choices both count up, so that both are seen to be independent.

    The draws are the same each time.
    """
    model_dir = make_checkpoint(tmp_path, "llama")
    (prompt,) = make_prompts(3, EOS_ID, longest=40)[2:]
    params = [replace(BASE, seed=seed, n=128, max_tokens=2, **fields) for seed in range(NUM_SEEDS)]
    with LLM(model_dir, **OPTIONS) as llm:
        outputs = llm.generate_outputs([prompt] * len(params), params, use_tqdm=False)
    drawn = Counter(tuple(c.token_ids) for output in outputs for c in output.outputs)
    count = drawn.total()
    assert count == NUM_SEEDS * 128
    expected = pair_probabilities(load_reference(model_dir), prompt, params[0])
    assert abs(sum(expected.values()) - 1) < 1e-6
    assert set(drawn) <= set(expected)
    seen, wanted = binned(drawn, {pair: p * count for pair, p in expected.items()})
    assert len(wanted) > 5
    chi_square = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True))
    freedom = len(wanted) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def binned(
    drawn: Counter[tuple[int, ...]], expected: dict[tuple[int, int], float]
) -> tuple[list[float], list[float]]:
    """Counts and expectations; pairs that come less than five times share one bin."""
    rare = {pair for pair, wanted in expected.items() if wanted < 5}
    seen = [float(drawn[pair]) for pair in expected if pair not in rare]
    wanted = [w for pair, w in expected.items() if pair not in rare]
    if rest := sum(expected[pair] for pair in rare):
        seen[-1] += sum(drawn[pair] for pair in rare)
        wanted[-1] += rest
    return seen, wanted


def test_the_combinations_have_every_pair_of_fields() -> None:
    names = {name for fields in ALONE for name in fields} - {"stop_token_ids"}
    have = {
        pair for seed in range(60) for pair in itertools.combinations(sorted(combined(seed)), 2)
    }
    assert set(itertools.combinations(sorted(names), 2)) <= have
