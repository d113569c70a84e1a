"""Grammars offline: with seeds, stops, choices and overlap, and on two ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from minisrv import LLM, Grammar, SamplingParams
from minisrv.errors import InvalidRequestError

OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_memory": "64MiB", "num_threads": 1}
LIST = Grammar.json_schema(
    {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 99},
        "minItems": 2,
        "maxItems": 4,
    }
)
PROMPTS = ["Hello", "What is 3 + 4?", "List", "Go on"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", **OPTIONS) as made:
        yield made


def texts(llm: LLM, **fields: Any) -> list[str]:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=80, grammar=LIST)
    outputs = llm.generate_outputs(PROMPTS, params, use_tqdm=False, **fields)
    return [choice.text for output in outputs for choice in output.outputs]


def test_all_choices_obey_and_repeat_with_the_seed(llm: LLM) -> None:
    first = texts(llm, n=3)
    assert first == texts(llm, n=3)
    for text in first:
        assert all(0 <= item <= 99 for item in json.loads(text))
    assert len(set(first)) > 3


@pytest.mark.parametrize(
    "options", [{"overlap_depth": 1}, {"tp": 2}, {"kernels": "torch"}], ids=str
)
def test_the_text_is_the_same_with_overlap_on_two_ranks_and_with_torch_operators(
    llm: LLM, options: dict[str, Any]
) -> None:
    with LLM("demo", **OPTIONS, **options) as other:
        assert texts(other) == texts(llm)


def test_a_small_cache_that_retracts_gives_the_same_texts(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.0, seed=1, max_tokens=90, grammar=Grammar.regex("[a-f]{90}")
    )
    prompts = [f"prompt {i}" for i in range(6)]
    expected = llm.generate(prompts, params, use_tqdm=False)
    with LLM("demo", **OPTIONS | {"kv_memory": None, "num_pages": 16, "max_seq_len": 128}) as small:
        assert small.generate(prompts, params, use_tqdm=False) == expected
        assert small._loop.scheduler.num_preemptions > 0
    assert all(re.fullmatch("[a-f]{1,90}", text) for text in expected)


def test_a_bad_grammar_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1: grammar cannot be used: regex, at"):
        llm.generate(["a", "b"], [SamplingParams(), SamplingParams(grammar=Grammar.regex("("))])
