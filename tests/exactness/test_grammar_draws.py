"""Grammars beside penalties, biases, min_tokens, stops, seeds and n: right masks, right draws.

The regex package says which tokens may come, transformers and OpenAI's formula what they weigh.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex

from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.llm import LLM
from minisrv.llm.outputs import CompletionOutput
from minisrv.sampling_params import Grammar, SamplingParams, TokenBias
from tests.support.checkpoints import EOS_ID, VOCAB_SIZE, make_checkpoint
from tests.support.oracle import load_reference, make_prompts
from tests.support.sampled_oracle import Allowed, check_tokens

BASE = SamplingParams(temperature=1.0, seed=1, max_tokens=24)
PATTERNS = [
    "[a-m]{3,9}( [0-9]{2}){1,6}",
    "(no|yes|ne[a-z]+)",
    "[ab]*",
    "-?[0-9]{1,20}",
    "(ab|ba)+x?",
]
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "presence_penalty": 2.0},
    {"temperature": 0.0, "repetition_penalty": 2.0, "frequency_penalty": 1.0},
    {"frequency_penalty": 2.0, "presence_penalty": 0.5},
    {"frequency_penalty": -2.0, "top_k": 3},
    {"repetition_penalty": 1.7, "top_p": 0.8},
    {"logit_bias": tuple(TokenBias(i, -100.0) for i in range(32, 110)), "min_p": 0.1},
    {"logit_bias": (TokenBias(EOS_ID, 100.0),), "presence_penalty": 1.0},
    {"logit_bias": (TokenBias(EOS_ID, 100.0),), "min_tokens": 9},
    {"min_tokens": 12, "repetition_penalty": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"stop_token_ids": (65, 66, 16), "frequency_penalty": 1.0, "min_tokens": 3},
    {"n": 4, "presence_penalty": 1.5, "repetition_penalty": 0.8},
]
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3")


def allowed_by(pattern: str, tokenizer: HFTokenizer) -> Allowed:
    """What the regex package says; each token is one byte, and the patterns are of ASCII."""
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(VOCAB_SIZE)]

    @cache
    def allowed(text: str) -> np.ndarray:
        mask = [bool(regex.fullmatch(pattern, text + t, partial=True)) for t in texts]
        mask[EOS_ID] = bool(regex.fullmatch(pattern, text))
        return np.array(mask)

    return lambda output: allowed("".join(texts[i] for i in output))


def check_end(pattern: str, params: SamplingParams, choice: CompletionOutput) -> None:
    whole = regex.fullmatch(pattern, choice.text)
    beginning = regex.fullmatch(pattern, choice.text, partial=True)
    if choice.finish_reason == "length":
        assert len(choice.token_ids) == params.max_tokens
        assert beginning
    elif choice.stop_reason is None:
        assert whole
    else:
        assert choice.stop_reason in params.stop_token_ids
        assert beginning
    if choice.token_ids[-1] == EOS_ID:
        assert len(choice.token_ids) > params.min_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"overlap_depth": 0, "num_pages": 1000},
        pytest.param(
            {"overlap_depth": 1, "num_pages": 1000, "max_prefill_tokens": 30},
            marks=pytest.mark.soak,
        ),
        {"overlap_depth": 1, "num_pages": 60, "page_size": 4, "max_prefill_tokens": 17},
    ],
    ids=str,
)
def test_constrained_draws_are_those_of_the_oracle(
    model_dir: Path, options: dict[str, Any]
) -> None:
    cases = [(pattern, fields) for pattern in PATTERNS for fields in FIELDS]
    prompts = make_prompts(len(cases), EOS_ID, longest=50)
    params = [
        replace(BASE, seed=i, grammar=Grammar.regex(pattern), **fields)
        for i, (pattern, fields) in enumerate(cases)
    ]
    with LLM(model_dir, **OPTIONS, **options) as llm:
        outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
        assert (llm._loop.scheduler.num_preemptions > 0) == (options["num_pages"] == 60)
        tokenizer = llm.tokenizer
    model = load_reference(model_dir)
    allowed = {pattern: allowed_by(pattern, tokenizer) for pattern in PATTERNS}
    for (pattern, fields), prompt, p, output in zip(cases, prompts, params, outputs, strict=True):
        for choice in output.outputs:
            ids = choice.token_ids
            try:
                check_tokens(model, prompt, ids, p, choice.index, [EOS_ID], allowed[pattern])
                check_end(pattern, p, choice)
            except AssertionError as error:
                raise AssertionError(f"{pattern}, {fields}, {choice}: {error}") from error


def test_a_stop_string_cuts_a_constrained_text_where_it_first_comes(model_dir: Path) -> None:
    pattern = "[a-m]{3,9}( [0-9]{2}){1,6}"
    params = replace(
        BASE, grammar=Grammar.regex(pattern), n=20, presence_penalty=1.0, repetition_penalty=1.2
    )
    with LLM(model_dir, **OPTIONS, num_pages=1000) as llm:
        whole, cut, late = (
            llm.generate_outputs("x", params, use_tqdm=False, **fields)[0].outputs
            for fields in ({}, {"stop": ("1", "c")}, {"stop": ("1", "c"), "min_tokens": 6})
        )
    for full, stopped in zip(whole, cut, strict=True):
        found = regex.search("[1c]", full.text)
        assert stopped.text == (full.text[: found.start()] if found else full.text)
        assert stopped.stop_reason == (found[0] if found else None)
    for stopped in late:
        assert regex.fullmatch(pattern, stopped.text, partial=True)
        assert not stopped.stop_reason or len(stopped.token_ids) > 6
    assert any(choice.stop_reason for choice in cut)
    assert any(choice.stop_reason is None for choice in cut)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[A-Z][a-z]*$"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c", "dd"]}, "maxItems": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "nested": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "tags", "age", "nested"],
    "additionalProperties": False,
}


def random_fields(rng: random.Random) -> dict[str, Any]:
    biased = rng.sample(range(512), rng.randint(0, 200))
    return {
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.3, 2),
        "logit_bias": tuple(TokenBias(i, rng.choice([-100.0, -5.0, 5.0, 100.0])) for i in biased),
        "top_p": rng.choice([1.0, 0.7]),
        "top_k": rng.choice([0, 1, 20]),
        "min_tokens": rng.choice([0, 0, 30]),
        "seed": rng.randrange(1000),
        "n": rng.randint(1, 3),
    }


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", **OPTIONS, num_pages=1000) as llm:
        yield llm


def check_people(demo: LLM, seeds: Sequence[int]) -> None:
    base = replace(BASE, max_tokens=250, grammar=Grammar.json_schema(PERSON))
    params = [replace(base, **random_fields(random.Random(i))) for i in seeds]
    outputs = demo.generate_outputs(["Who are you?"] * len(params), params, use_tqdm=False)
    choices = [choice for output in outputs for choice in output.outputs]
    ended = [choice for choice in choices if choice.finish_reason == "stop"]
    for choice in ended:
        jsonschema.validate(json.loads(choice.text), PERSON)
    # Negative penalties and biases can make a model go on with blanks until it is cut off.
    assert len(ended) >= 0.8 * len(choices)


def test_json_stays_valid_whatever_penalties_and_biases_do(demo: LLM) -> None:
    check_people(demo, range(20))


@pytest.mark.soak
def test_json_stays_valid_in_many_more_cases(demo: LLM) -> None:
    check_people(demo, range(100, 2000))
