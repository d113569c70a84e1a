"""Greedy tokens equal those of transformers, whichever way the requests are served."""

import itertools
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import (
    CHECKPOINTS,
    EVERY_WAY,
    PAIRWISE,
    Way,
    compare,
    load_reference,
    make_loop,
    make_prompts,
    reference_tokens,
    run,
)


@dataclass
class Case:
    """A checkpoint, its prompts, and what transformers makes of them."""

    model_dir: Path
    model: PreTrainedModel
    prompts: list[list[int]]
    expected: list[list[int]]


def make_case(folder: Path, name: str, num_prompts: int) -> Case:
    architecture, variant = CHECKPOINTS[name]
    model_dir = make_checkpoint(folder, architecture, **variant)
    model = load_reference(model_dir)
    prompts = make_prompts(num_prompts, model.config.vocab_size)
    return Case(model_dir, model, prompts, reference_tokens(model, prompts))


def check(case: Case, way: Way) -> None:
    loop = make_loop(case.model_dir, way)
    outputs, _ = run(loop, case.prompts, way.at_once)
    loop.scheduler.check()
    ties = compare(case.model, case.prompts, case.expected, outputs)
    print(*ties, sep="\n")
    assert len(ties) <= len(case.prompts) // 100
    if not way.radix_cache:
        return
    warm, cached = run(loop, case.prompts, way.at_once)
    compare(case.model, case.prompts, case.expected, warm)
    longest = max(range(len(case.prompts)), key=lambda i: len(case.prompts[i]))
    assert cached[longest] > 0


def test_the_short_list_of_ways_has_every_pair_of_values() -> None:
    def pairs(ways: list[Way]) -> set[object]:
        return {
            (a, b, astuple(way)[a], astuple(way)[b])
            for way in ways
            for a, b in itertools.combinations(range(6), 2)
        }

    assert pairs(PAIRWISE) == pairs(EVERY_WAY)


@pytest.fixture(scope="module", params=["llama", "qwen3-moe"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("checkpoint"), request.param, 8)


@pytest.mark.parametrize("way", PAIRWISE, ids=str)
def test_tokens_equal_those_of_transformers(case: Case, way: Way) -> None:
    check(case, way)


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2-tied", "qwen3", "llama-linear", "llama-llama3-tied", "qwen3-yarn"]
)
def test_tokens_of_other_models_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    check(make_case(tmp_path, name, 6), PAIRWISE[2])


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_tokens_equal_those_of_transformers_in_every_way(name: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, name, 50)
    for way in EVERY_WAY:
        check(case, way)


def test_two_identical_prompts_that_arrive_together_share_their_pages(case: Case) -> None:
    prompt = max(case.prompts, key=len)[:200]
    expected = reference_tokens(case.model, [prompt])
    loop = make_loop(case.model_dir, Way(True, 16, 64, 2, 0, "auto"))
    outputs, cached = run(loop, [prompt, prompt], 2)
    assert sorted(cached) == [0, 192]
    compare(case.model, [prompt, prompt], expected * 2, outputs)
