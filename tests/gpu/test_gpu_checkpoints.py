"""Checkpoints in 16 bits on a GPU, held against transformers in float32 on the same weights."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.host_runner import HostRunner
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.start_progress import no_progress
from tests.support.half_models import load, logits_of, save_checkpoint
from tests.support.oracle import NEW_TOKENS, make_prompts, run
from tests.support.step_driver import StepDriver, open_engine

DEVICE = torch.device("cuda")
CLEAR_MARGIN = 0.1  # of the best logit over the second; below it 16 bits may choose either
CASES = [
    ("qwen3", 128, torch.bfloat16),
    ("llama", 128, torch.bfloat16),
    ("qwen2", 64, torch.bfloat16),
    ("llama", 256, torch.bfloat16),
    ("qwen3", 128, torch.float16),
    ("qwen3", 64, torch.bfloat16),
    ("llama", 64, torch.bfloat16),
]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


@dataclass
class Case:
    """A checkpoint in 16 bits, and transformers' greedy tokens with it in float32."""

    path: Path
    dtype: torch.dtype
    model: PreTrainedModel
    prompts: list[list[int]]
    expected: list[list[int]]


def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=DEVICE)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{str(case[2])[6:]}"
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    arch, head_dim, dtype = request.param
    path = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), arch, head_dim, dtype)
    model = load(path, torch.float32, DEVICE)
    prompts = make_prompts(20, model.config.vocab_size)
    return Case(path, dtype, model, prompts, [greedy(model, prompt) for prompt in prompts])


def make_loop(path: Path, **options: Any) -> SchedulerLoop:
    config = ServerConfig(
        **{
            "model": str(path),
            "device": "cuda",
            "num_pages": 4000,
            "max_prefill_tokens": 256,
            "max_running_requests": 32,
            **options,
        }
    )
    return build_loop(config, path, LocalChannel(), no_progress)


def assert_agree(case: Case, outputs: list[list[int]]) -> None:
    """Equal up to the first place where the margin in float32 is not clear."""
    num_compared = 0
    for prompt, want, got in zip(case.prompts, case.expected, outputs, strict=True):
        best = logits_of(case.model, prompt + want)[len(prompt) - 1 : -1].topk(2).values
        unclear = ((best[:, 0] - best[:, 1]) < CLEAR_MARGIN).nonzero().flatten().tolist()
        clear = unclear[0] if unclear else len(want)
        assert got[:clear] == want[:clear]
        num_compared += clear
    assert num_compared > 4 * len(outputs)


def test_logits_are_as_near_to_float32_as_those_of_transformers(case: Case) -> None:
    """The prompt goes in chunks; wherever one ends, its logits are compared."""
    half = load(case.path, case.dtype, DEVICE)
    driver = StepDriver(open_engine(case.path, device="cuda", num_pages=400))
    errors: list[tuple[float, float]] = []
    rng = random.Random(0)
    for prompt in case.prompts:
        exact, theirs = logits_of(case.model, prompt), logits_of(half, prompt)
        sequence, done = driver.add(), 0
        while done < len(prompt):
            chunk = prompt[done : done + rng.choice([1, 7, 100])]
            done += len(chunk)
            ours = driver.logits(prefills=[(sequence, chunk)])[0].cpu()
            errors.append(
                (
                    float((ours - exact[done - 1]).square().mean()),
                    float((theirs[done - 1] - exact[done - 1]).square().mean()),
                )
            )
        driver.release(sequence)
    our_error, their_error = np.sqrt(np.mean(errors, axis=0))
    assert our_error <= 2 * their_error, f"rms {our_error:.4f}, transformers {their_error:.4f}"


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_cold_and_warm(case: Case, page_size: int, overlap_depth: int) -> None:
    loop = make_loop(case.path, page_size=page_size, overlap_depth=overlap_depth)
    cold, _ = run(loop, case.prompts, 32)
    assert_agree(case, cold)
    warm, cached = run(loop, case.prompts, 32)
    assert sum(cached) > 0
    assert_agree(case, warm)
    loop.scheduler.check()


@pytest.mark.parametrize("at_once", [1, 3, 20])
def test_graphs_give_the_tokens_of_eager_steps(case: Case, at_once: int) -> None:
    """With as many at once as a graph has, with padding, and more than the largest graph takes."""
    eager, _ = run(make_loop(case.path, cuda_graph_max_bs=0), case.prompts, at_once)
    graphs, _ = run(make_loop(case.path, cuda_graph_max_bs=16), case.prompts, at_once)
    assert_agree(case, eager)
    assert_agree(case, graphs)


@pytest.mark.parametrize("largest", [0, 16])
@pytest.mark.parametrize(
    "switch",
    [{"joined_kernels": True}, {"programmatic_launch": True}, {"cuda_graph_max_tokens": 256}],
    ids=lambda switch: next(iter(switch)),
)
def test_what_is_off_by_default_gives_the_same_tokens(
    case: Case, switch: dict[str, Any], largest: int
) -> None:
    for at_once in (1, 3, 20):
        loop = make_loop(case.path, cuda_graph_max_bs=largest, **switch)
        tokens, _ = run(loop, case.prompts, at_once)
        assert_agree(case, tokens)


@pytest.mark.parametrize("case", CASES[:1], indirect=True, ids=["qwen3-128-bfloat16"])
@pytest.mark.parametrize("largest", [0, 16])
@pytest.mark.parametrize("kernel", ["cuda_core", "xqa"])
def test_each_decode_kernel_gives_the_same_tokens(case: Case, kernel: str, largest: int) -> None:
    for at_once in (1, 3, 20):
        loop = make_loop(case.path, cuda_graph_max_bs=largest, decode_kernel=kernel)
        tokens, _ = run(loop, case.prompts, at_once)
        assert_agree(case, tokens)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "lacking"),
    [
        (64, "float32", "does not support float32"),
        (80, "bfloat16", "does not support a head size of 80"),
    ],
)
def test_what_flashinfer_lacks_is_served_by_torch_with_one_warning(
    tmp_path: Path, head_dim: int, dtype: str, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_checkpoint(tmp_path, "qwen3", head_dim)
    with caplog.at_level(logging.WARNING, logger="minisrv"):
        loop = make_loop(path, dtype=dtype)
    assert [lacking in message for message in caplog.messages] == [True]
    assert isinstance(loop.engine, Engine)
    assert isinstance(loop.engine._rank_0.runner, HostRunner)
    model = load(path, torch.float32, DEVICE)
    prompts = make_prompts(8, model.config.vocab_size, longest=200)
    expected = [greedy(model, prompt) for prompt in prompts]
    assert_agree(Case(path, torch.bfloat16, model, prompts, expected), run(loop, prompts, 8)[0])
