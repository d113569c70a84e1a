"""Two or more ranks give the tokens of transformers, as one does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.parallel.communicator import TPGroup
from minisrv.engine.parallel.ranks import Ranks
from minisrv.engine.step_runner import StepHandle
from minisrv.errors import ConfigError, EngineDeadError
from minisrv.llm import LLM
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.start_progress import no_progress
from tests.support.checkpoints import make_checkpoint
from tests.support.oracle import Way, compare, load_reference, make_prompts, reference_tokens, run

WAY = Way(True, 16, 64, 32, 1, "auto")


@contextmanager
def parallel_loop(model_dir: Path, tp: int, **options: Any) -> Iterator[SchedulerLoop]:
    config = ServerConfig(
        model=str(model_dir),
        dtype="float32",
        device="cpu",
        tp=tp,
        max_prefill_tokens=WAY.budget,
        max_running_requests=32,
        overlap_depth=WAY.overlap_depth,
        num_threads=1,
        **options,
    )
    loop = build_loop(config, model_dir, LocalChannel(), no_progress)
    assert isinstance(loop.engine, Engine)
    try:
        yield loop
    finally:
        loop.engine.close()


@dataclass
class Case:
    model_dir: Path
    model: PreTrainedModel


@pytest.mark.parametrize(
    ("architecture", "variant", "tp"),
    [
        ("llama", {"num_key_value_heads": 1, "vocab_size": 385}, 2),
        *(
            pytest.param(
                *("qwen2", {"tie_word_embeddings": True, "vocab_size": 387}, tp),
                marks=pytest.mark.soak,
            )
            for tp in (2, 4)
        ),
        pytest.param("qwen3", {}, 2, marks=pytest.mark.soak),
        ("qwen3_moe", {}, 2),
    ],
)
def test_the_tokens_are_those_of_transformers(
    tmp_path: Path, architecture: str, variant: dict[str, Any], tp: int
) -> None:
    model_dir = make_checkpoint(tmp_path, architecture, **variant)
    model = load_reference(model_dir)
    vocab_size = model.config.vocab_size
    prompts = [*make_prompts(4, vocab_size, longest=300), *make_prompts(12, vocab_size, longest=40)]
    expected = reference_tokens(model, prompts)
    # So few pages that requests are preempted and go on.
    with parallel_loop(model_dir, tp, page_size=16, num_pages=26) as loop:
        outputs, _ = run(loop, prompts, WAY.at_once)
        assert loop.scheduler.num_preemptions > 0
        loop.scheduler.check()
    assert not compare(model, prompts, expected, outputs)


@pytest.mark.soak
def test_a_seeded_draw_is_the_same_with_one_rank_and_two() -> None:
    texts = []
    for tp in (1, 2):
        with LLM("demo", dtype="float32", tp=tp, num_threads=1, kv_memory="64MiB") as llm:
            texts.append(
                llm.generate(
                    ["Count", "Hi"], temperature=1.5, seed=7, max_tokens=40, use_tqdm=False
                )
            )
    assert texts[0] == texts[1]


def test_without_restarts_the_death_of_a_rank_is_an_error_that_names_it() -> None:
    with LLM("demo", tp=2, num_threads=1, kv_memory="64MiB", restart_limit="0") as llm:
        llm.generate("Count", max_tokens=3, use_tqdm=False)
        engine = llm._loop.engine
        assert isinstance(engine, Engine)
        assert engine._ranks is not None
        engine._ranks._children[0]._popen.kill()
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"rank 1 process has died.*SIGKILL"):
                llm.generate("Count", max_tokens=3, use_tqdm=False)


class StuckEvent:
    """The event of a step whose kernels wait for another rank; `done` after an abort."""

    done = False

    def query(self) -> bool:
        return self.done


@pytest.mark.parametrize("abort_ends_it", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_step_that_waits_for_a_dead_rank_ends_with_its_error(
    abort_ends_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, aborted = StuckEvent(), []

    def abort(group: TPGroup) -> None:
        aborted.append(group)
        event.done = abort_ends_it

    monkeypatch.setattr(TPGroup, "abort", abort)
    with LLM("demo", tp=2, num_threads=1, kv_memory="64MiB") as llm:
        engine = llm._loop.engine
        assert isinstance(engine, Engine)
        assert engine._ranks is not None
        threading.Timer(0.3, engine._ranks._children[0]._popen.kill).start()
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=r"rank 1 process has died.*SIGKILL"):
            engine.wait(StepHandle(torch.zeros(1, dtype=torch.int32), None, event))
        assert 0.2 < time.monotonic() - began < 20
    assert len(aborted) == 1


@pytest.mark.soak
def test_engines_that_start_in_the_same_directory_do_not_meet(tmp_path: Path) -> None:
    """As those of a scheduler that was killed and of the next one do."""
    model_dir, run_dir = make_checkpoint(tmp_path, "llama"), tmp_path / "run"
    run_dir.mkdir()
    config = ServerConfig(model=str(model_dir), device="cpu", tp=2, num_threads=1, num_pages=10)
    model_config = load_model_config(model_dir, None)
    first = Engine(config, model_dir, model_config, run_dir=run_dir)
    try:
        second = Engine(config, model_dir, model_config, run_dir=run_dir)
        second.close()
        first.check()
    finally:
        first.close()
    assert not list(run_dir.iterdir())


def test_ranks_without_a_directory_to_meet_in_are_an_error_at_once(tmp_path: Path) -> None:
    ranks = Ranks(ServerConfig(tp=2), tmp_path, tmp_path / "nowhere")
    with pytest.raises(EngineDeadError, match=r"cannot start the ranks: .*nowhere"):
        ranks.wait_until_joining()
    ranks.close()


def test_what_one_rank_refuses_is_the_error_of_all(tmp_path: Path) -> None:
    model_dir = make_checkpoint(tmp_path, "llama")
    (model_dir / "model.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(ConfigError, match="not a valid safetensors file"):
        LLM(model_dir, tp=2)


def test_a_model_that_cannot_be_split_is_refused_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tp is 3; .*supports --tp 1, 2, 4$"):
        LLM(make_checkpoint(tmp_path, "llama"), tp=3)
