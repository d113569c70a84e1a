"""A seed gives its text again, whoever is there beside it and however it is computed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from minisrv.llm import LLM
from minisrv.llm.outputs import RequestOutput
from minisrv.sampling_params import Grammar, SamplingParams, TokenBias
from tests.support.checkpoints import EOS_ID, make_checkpoint
from tests.support.oracle import load_reference, make_prompts
from tests.support.sampled_oracle import check_tokens

PLAIN = SamplingParams(temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)
WORD = {"type": "string", "minLength": 2, "maxLength": 4}
LIST = {"type": "array", "items": WORD, "minItems": 3, "maxItems": 6}
SEEDED = [
    PLAIN,
    replace(PLAIN, seed=-5, temperature=0.8, top_p=0.9, top_k=40, min_p=0.15, max_tokens=31),
    replace(PLAIN, seed=0, presence_penalty=1.1, frequency_penalty=0.7, max_tokens=28),
    replace(PLAIN, seed=2**63 - 1, repetition_penalty=1.4, top_k=30, max_tokens=18),
    replace(PLAIN, seed=7, logit_bias=(TokenBias(65, 4.0), TokenBias(66, -100.0)), max_tokens=22),
    replace(PLAIN, seed=8, n=3, frequency_penalty=-0.5, top_p=0.95),
    replace(PLAIN, seed=-(2**63), grammar=Grammar.regex("[a-m]{20}([n-z ]{4})+")),
    replace(
        PLAIN,
        seed=9,
        n=2,
        grammar=Grammar.json_schema(LIST),
        presence_penalty=0.9,
        repetition_penalty=1.2,
        logit_bias=(TokenBias(65, 2.0),),
        min_tokens=4,
        ignore_eos=False,
        max_tokens=40,
    ),
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1}


@dataclass
class Case:
    """A checkpoint, the prompts of SEEDED, and what each gives alone: ids, text and end."""

    model_dir: Path
    prompts: list[list[int]]
    alone: list[list[tuple[Any, ...]]]


def choices_of(output: RequestOutput) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs]


def make_case(folder: Path, architecture: str) -> Case:
    model_dir = make_checkpoint(folder, architecture)
    prompts = make_prompts(len(SEEDED), EOS_ID, longest=90)
    with LLM(model_dir, **OPTIONS, num_pages=2000, overlap_depth=0, radix_cache=False) as llm:
        alone = [
            choices_of(llm.generate_outputs([prompt], params, use_tqdm=False)[0])
            for prompt, params in zip(prompts, SEEDED, strict=True)
        ]
    return Case(model_dir, prompts, alone)


@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.soak), "qwen3_moe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("checkpoint"), request.param)


def crowd(prompts: Sequence[list[int]], rng: random.Random) -> list[tuple[int | None, Any, Any]]:
    """SEEDED among as many others without a seed, in any order: (place in SEEDED, prompt, ...)."""
    listed: list[tuple[int | None, Any, Any]] = [
        (i, prompt, params) for i, (prompt, params) in enumerate(zip(prompts, SEEDED, strict=True))
    ]
    for prompt, params in zip(prompts, SEEDED, strict=True):
        start = [*prompt[: rng.randint(1, len(prompt))], rng.randrange(EOS_ID)]
        other = replace(params, seed=None, max_tokens=rng.randint(4, 40), min_tokens=0)
        listed.append((None, start, other))
    rng.shuffle(listed)
    return listed


def check_crowd(case: Case, llm: LLM, rng: random.Random) -> None:
    places, prompts, params = zip(*crowd(case.prompts, rng), strict=True)
    outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
    for place, output in zip(places, outputs, strict=True):
        if place is not None:
            assert choices_of(output) == case.alone[place], f"request {place}"
    llm._loop.scheduler.check()


def test_the_draws_alone_are_those_of_transformers_and_of_the_page_on_sampling(case: Case) -> None:
    model = load_reference(case.model_dir)
    for prompt, params, alone in zip(case.prompts, SEEDED, case.alone, strict=True):
        if params.grammar is not None:
            continue  # tests/exactness/test_grammar_draws.py
        for choice, (ids, *_) in enumerate(alone):
            check_tokens(model, prompt, ids, params, choice)
    assert len({tuple(ids) for alone in case.alone for ids, *_ in alone}) == 11


WAYS = [
    {"overlap_depth": 0, "max_prefill_tokens": 7, "page_size": 1, "max_running_requests": 5},
    {"overlap_depth": 1, "max_prefill_tokens": 16, "page_size": 16, "max_running_requests": 9},
    {"overlap_depth": 1, "max_prefill_tokens": 512, "page_size": 4, "kernels": "torch"},
    {"overlap_depth": 0, "max_prefill_tokens": 33, "page_size": 8, "radix_cache": False},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_in_a_crowd_cold_and_warm_however_it_is_chunked(case: Case, way: dict[str, Any]) -> None:
    rng = random.Random(3)
    with LLM(case.model_dir, **OPTIONS, num_pages=6000 // way["page_size"], **way) as llm:
        for _ in range(2):
            check_crowd(case, llm, rng)
        assert not llm._loop.scheduler.num_preemptions


@pytest.mark.parametrize(("overlap_depth", "budget"), [(0, 64), (1, 9)])
def test_after_retractions(case: Case, overlap_depth: int, budget: int) -> None:
    options = {"page_size": 4, "num_pages": 60, "max_prefill_tokens": budget}
    with LLM(case.model_dir, **OPTIONS, overlap_depth=overlap_depth, **options) as llm:
        for seed in range(2):
            check_crowd(case, llm, random.Random(seed))
        assert llm._loop.scheduler.num_preemptions > 5


def test_on_two_ranks(case: Case) -> None:
    options = {"page_size": 4, "num_pages": 60, "max_prefill_tokens": 20}
    with LLM(case.model_dir, **OPTIONS, tp=2, **options) as llm:
        check_crowd(case, llm, random.Random(5))
        assert llm._loop.scheduler.num_preemptions > 0


def test_a_choice_is_the_same_whatever_n_is(case: Case) -> None:
    with LLM(case.model_dir, **OPTIONS, num_pages=2000) as llm:
        for prompt, params, alone in zip(case.prompts, SEEDED, case.alone, strict=True):
            (output,) = llm.generate_outputs([prompt], replace(params, n=5), use_tqdm=False)
            assert choices_of(output)[: params.n] == alone
            assert len({text for _, text, *_ in choices_of(output)}) > 3


@pytest.mark.soak
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_in_many_crowds_of_every_kind(case: Case, overlap_depth: int, tp: int) -> None:
    for budget, num_pages in ((5, 60), (24, 70), (200, 90), (2048, 1000)):
        options = {"page_size": 4, "num_pages": num_pages, "max_prefill_tokens": budget}
        with LLM(case.model_dir, **OPTIONS, overlap_depth=overlap_depth, tp=tp, **options) as llm:
            for seed in range(6):
                check_crowd(case, llm, random.Random(seed))
