"""JSON of random schemas, by a model that can write and by one with random weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.protocols import Validator

from minisrv import LLM, Grammar, SamplingParams
from minisrv.structured_output.source import to_source
from minisrv.structured_output.vocabulary import Vocabulary, read_vocabulary
from tests.support.checkpoints import make_checkpoint
from tests.support.schemas import FEATURES, make_schema

OPTIONS = {"dtype": "float32", "kv_memory": "256MiB"}
MAX_TOKENS = 600
WORDS = re.findall(
    r"[$\w]+",
    """
minLength maxLength pattern format enum const minimum maximum exclusiveMinimum multipleOf minItems
maxItems prefixItems required additionalProperties patternProperties maxProperties anyOf oneOf allOf
$ref $defs title
""",
)


@pytest.fixture(scope="module", params=["demo", "random"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path: str | Path = "demo"
    if request.param == "random":
        path = make_checkpoint(tmp_path_factory.mktemp("random"), "qwen3", seed=4)
    with LLM(path, **OPTIONS) as made:
        yield made


def test_each_feature_is_in_many_of_the_schemas() -> None:
    text = [json.dumps(make_schema(seed)) for seed in range(200)]
    for word in WORDS:
        assert sum(f'"{word}"' in schema for schema in text) >= 5, word


@pytest.mark.parametrize("llm", ["demo"], indirect=True)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.__name__)
def test_every_text_of_a_feature_is_valid(llm: LLM, feature: Any) -> None:
    counts = check_texts(llm, [feature(Random(seed), 1) for seed in range(3)])
    assert counts["finished"] >= 2


def test_texts_of_some_random_schemas_are_valid(llm: LLM) -> None:
    counts = check_texts(llm, [make_schema(seed) for seed in range(24)])
    assert counts["finished"] >= 22


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_texts_of_300_random_schemas_are_valid(llm: LLM) -> None:
    counts = check_texts(llm, [make_schema(seed) for seed in range(300)])
    print(dict(counts))
    assert counts["finished"] >= 285


def check_texts(llm: LLM, schemas: list[dict[str, Any]]) -> Counter[str]:
    """One text a schema: valid if finished, else the beginning of a valid one."""
    params = [
        SamplingParams(seed=i, max_tokens=MAX_TOKENS, grammar=Grammar.json_schema(schema))
        for i, schema in enumerate(schemas)
    ]
    prompts = ["Answer in JSON.\n"] * len(schemas)
    outputs = llm.generate_outputs(prompts, params, use_tqdm=False, temperature=1.0)
    counts: Counter[str] = Counter()
    for schema, output in zip(schemas, outputs, strict=True):
        (choice,) = output.outputs
        text = choice.text
        if choice.finish_reason == "length":
            counts["unfinished"] += 1
            text = completed(llm, schema, choice.token_ids)
            assert text.startswith(choice.text.rstrip("\ufffd"))
        else:
            assert choice.finish_reason == "stop"
            counts["finished"] += 1
        validator(schema).validate(json.loads(text))
    return counts


def validator(schema: dict[str, Any]) -> Validator:
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, format_checker=FormatChecker())


def completed(llm: LLM, schema: dict[str, Any], token_ids: list[int]) -> str:
    """The text with a short end: proof that it could have gone on to a valid one."""
    eos = llm.model_config.eos_token_ids
    vocabulary = Vocabulary(read_vocabulary(llm.tokenizer, llm.model_config.vocab_size, eos))
    matcher = vocabulary.compile(to_source(Grammar.json_schema(schema)))
    ids = list(token_ids)
    for token_id in ids:
        matcher.advance(token_id)
    wanted = [*eos, *(i for c in '"}]0,1:' for i in llm.tokenizer.encode(c))]
    words = np.empty(vocabulary.num_words, np.int32)
    while not matcher.ended and not matcher.error:
        matcher.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        token_id = next((i for i in wanted if i in allowed), allowed[0])
        if token_id in eos:
            break
        matcher.advance(token_id)
        ids.append(token_id)
        assert len(ids) < len(token_ids) + 2000, "there is no end"
    assert matcher.error is None
    return llm.tokenizer.decode(ids)
