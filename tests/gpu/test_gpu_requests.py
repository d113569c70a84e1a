"""What requests ask for beside greedy text: penalties, biases, grammars and logprobs.

Every token is held against transformers in float32, with and without CUDA graphs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from minisrv.checkpoint.tokenizer import load_tokenizer
from minisrv.llm.outputs import TokenLogprob
from minisrv.sampling_params import Grammar, SamplingParams, TokenBias
from tests.support.checkpoints import EOS_ID
from tests.support.half_models import (
    GREEDY,
    assert_best,
    generate,
    load,
    logits_of,
    save_checkpoint,
)
from tests.support.oracle import make_prompts
from tests.support.sampled_oracle import Allowed

FIELDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {},
    {"presence_penalty": 2.0, "frequency_penalty": 1.5},
    {"logit_bias": (TokenBias(65, 100.0),), "frequency_penalty": 2.0},
    {"presence_penalty": -2.0, "repetition_penalty": 0.7},
    {"logit_bias": tuple(TokenBias(i, -100.0) for i in range(100)), "min_tokens": 5},
]
PATTERNS = ["[a-m]{3,9}( [0-9]{2}){1,6}", None, "(no|yes|ne[a-z]+)", "-?[0-9]{1,20}"]
GRAPHS = pytest.mark.parametrize(
    "largest", [pytest.param(0, id="eager", marks=pytest.mark.soak), pytest.param(8, id="graphs")]
)
pytestmark = pytest.mark.also_cpu


@dataclass
class Case:
    path: Path
    model: PreTrainedModel
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3", 128)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Case(path, load(path, torch.float32, device), make_prompts(12, EOS_ID, longest=150))


@GRAPHS
def test_penalties_and_biases(case: Case, device: torch.device, largest: int) -> None:
    params = [replace(GREEDY, **FIELDS[i % len(FIELDS)]) for i in range(len(case.prompts))]
    outputs = generate(case.path, device, case.prompts, params, cuda_graph_max_bs=largest)
    for output, asked in zip(outputs, params, strict=True):
        prompt, (choice,) = output.prompt_token_ids, output.outputs
        logits = logits_of(case.model, [*prompt, *choice.token_ids])
        assert_best(logits, prompt, choice, asked)


@GRAPHS
def test_grammars(case: Case, device: torch.device, largest: int) -> None:
    """Beside requests without one."""
    pytest.importorskip("llguidance")
    patterns = [PATTERNS[i % len(PATTERNS)] for i in range(len(case.prompts))]
    params = [
        replace(GREEDY, ignore_eos=pattern is None, grammar=pattern and Grammar.regex(pattern))
        for pattern in patterns
    ]
    outputs = generate(case.path, device, case.prompts, params, cuda_graph_max_bs=largest)
    for output, asked, pattern in zip(outputs, params, patterns, strict=True):
        prompt, (choice,) = output.prompt_token_ids, output.outputs
        logits = logits_of(case.model, [*prompt, *choice.token_ids])
        assert_best(logits, prompt, choice, asked, allowed_by(case.path, asked))
        if pattern is not None and choice.finish_reason == "stop":
            assert re.fullmatch(pattern, choice.text)


def allowed_by(path: Path, params: SamplingParams) -> Allowed | None:
    """The masks of llguidance, applied in order to an output."""
    if params.grammar is None:
        return None
    from minisrv.structured_output.source import to_source
    from minisrv.structured_output.vocabulary import Vocabulary, read_vocabulary

    tokenizer = load_tokenizer(path)
    vocabulary = Vocabulary(read_vocabulary(tokenizer, tokenizer.vocab_size, [EOS_ID]))
    start = vocabulary.compile(to_source(params.grammar))

    def allowed(output: Any) -> np.ndarray:
        matcher, words = start.copy(), np.zeros(vocabulary.num_words, np.int32)
        for token in output:
            matcher.advance(token)
        matcher.fill(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return bits[: tokenizer.vocab_size].astype(bool)

    return allowed


@GRAPHS
def test_logprobs(case: Case, device: torch.device, largest: int) -> None:
    """Of outputs and of prompts, which are computed in chunks."""
    asked = [{"logprobs": 5, "prompt_logprobs": 2}, {}, {"logprobs": 0}]
    params = [replace(GREEDY, **asked[i % 3]) for i in range(len(case.prompts))]
    outputs = generate(case.path, device, case.prompts, params, cuda_graph_max_bs=largest)
    errors: list[float] = []
    for output, one in zip(outputs, params, strict=True):
        prompt, (choice,) = output.prompt_token_ids, output.outputs
        ids = [*prompt, *choice.token_ids]
        logits = logits_of(case.model, ids)
        assert_best(logits, prompt, choice, one)
        expected = logits.log_softmax(-1)
        if one.logprobs is not None:
            found = expected[len(prompt) - 1 : -1]
            errors += distances(choice.logprobs, choice.token_ids, found, one.logprobs)
        if one.prompt_logprobs is not None:
            found = expected[: len(prompt) - 1]
            errors += distances(output.prompt_logprobs, prompt[1:], found, one.prompt_logprobs)
    assert len(errors) > 1000
    assert np.mean(errors) < 0.05
    assert max(errors) < 0.5


def distances(
    found: list[TokenLogprob], ids: list[int], expected_TV: torch.Tensor, num_top: int
) -> list[float]:
    """How far each logprob is from the one expected."""
    assert [one.token_id for one in found] == ids
    errors = []
    for one, logprobs in zip(found, expected_TV, strict=True):
        assert len(one.top) == num_top
        pairs = [(one.token_id, one.logprob), *one.top]
        errors += [abs(value - float(logprobs[token])) for token, value in pairs]
    return errors
