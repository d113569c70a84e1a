"""A grammar on the step that is made for a GPU: the text is that of the step on the host."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("flashinfer")
from minisrv import LLM, Grammar, SamplingParams
from tests.support.device_parts import use_device_runner

OPTIONS: dict[str, Any] = {"dtype": "float32", "num_pages": 400, "num_threads": 1}
GRAMMARS = [
    Grammar.json_schema({"type": "array", "items": {"enum": ["one", "two", 3]}, "maxItems": 5}),
    None,
    Grammar.regex("[a-f]{3}( [0-9]{2}){1,4}"),
]


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("largest", [0, 8])
def test_constrained_and_free_texts_are_those_of_the_host_step(
    overlap_depth: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [SamplingParams(temperature=0, max_tokens=40, grammar=grammar) for grammar in GRAMMARS]
    prompts = ["Hello", "What is 3 + 4?", "Go on"]
    with LLM("demo", **OPTIONS) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    repeat = use_device_runner(monkeypatch)
    options = {**OPTIONS, "overlap_depth": overlap_depth, "cuda_graph_max_bs": largest}
    with LLM("demo", **options) as llm:
        assert llm.generate(prompts, params, use_tqdm=False) == expected
    assert bool(repeat.replays) == bool(largest)
    assert all(item in ("one", "two", 3) for item in json.loads(expected[0]))
