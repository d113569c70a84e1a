"""The step that is made for a GPU gives seeded requests the text of the host's step, in any crowd.

The stand-in for its sampler draws as the host does, from the columns that the step buffer carries.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("flashinfer")
from minisrv.llm import LLM
from tests.exactness.test_seeds import OPTIONS, Case, check_crowd, make_case
from tests.support.device_parts import use_device_runner


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("checkpoint"), "qwen3")


@pytest.mark.parametrize(
    ("overlap_depth", "num_pages", "largest", "budget"),
    [
        *((0, 2000, 0, 512), (1, 60, 8, 20)),
        pytest.param(1, 2000, 256, 20, marks=pytest.mark.soak),
    ],
)
def test_seeded_texts_are_those_of_the_host_step(
    case: Case,
    overlap_depth: int,
    num_pages: int,
    largest: int,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repeat = use_device_runner(monkeypatch)
    options = {"page_size": 4, "num_pages": num_pages, "max_prefill_tokens": budget}
    options |= {"overlap_depth": overlap_depth, "cuda_graph_max_bs": largest}
    options["max_running_requests"] = 40  # the largest graph, for all choices of the crowd
    with LLM(case.model_dir, **OPTIONS, **options) as llm:
        for seed in range(2):
            check_crowd(case, llm, random.Random(seed))
        assert (llm._loop.scheduler.num_preemptions > 0) == (num_pages == 60)
    assert bool(repeat.replays) == bool(largest)
