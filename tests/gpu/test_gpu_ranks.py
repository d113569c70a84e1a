"""Two ranks: on one device, and with NCCL where there are two GPUs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.engine.parallel.communicator import TPGroup
from minisrv.engine.parallel.shard import Sharding
from minisrv.engine.rank_engine import RankEngine
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.start_progress import no_progress
from tests.support.half_models import MARGIN, load, logits_of, save_checkpoint
from tests.support.oracle import make_prompts, run
from tests.support.step_driver import StepDriver

CPU = torch.device("cpu")
VOCAB_SIZE = 387  # the shards differ in size
# Every expert is chosen: in 16 bits another one might be, which changes the text.
ARCHITECTURES = {"qwen3": {}, "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 2}}


class HostGroup(TPGroup):
    """Ranks that share a GPU, which NCCL does not allow, meet in the memory of the host."""

    def __init__(self, sharding: Sharding, run_dir: Path) -> None:
        super().__init__(sharding, run_dir, CPU)

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        return x_TC.copy_(super().all_reduce(x_TC.cpu()))

    def gather_logits(
        self, logits: Tensor, vocab_size: int, out_SV: Tensor | None = None
    ) -> Tensor:
        gathered = super().gather_logits(logits.cpu(), vocab_size)
        return gathered.to(logits.device) if out_SV is None else out_SV.copy_(gathered)

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(super().broadcast(x.cpu()))


class TwoRanks:
    """A ForwardEngine of two ranks in two threads of this process, on one device."""

    def __init__(self, path: Path, device: torch.device, run_dir: Path, **options: Any) -> None:
        self._config = ServerConfig(
            model=str(path),
            tp=2,
            num_threads=1,
            num_pages=400,
            max_prefill_tokens=256,
            max_running_requests=8,
            **options,
        )
        self._path, self._device, self._run_dir = path, device, run_dir
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._ranks = [future.result() for future in self._on_each(self._build)]
        self.num_pages, self.page_size = self._ranks[0].num_pages, self._config.page_size

    def launch(self, batch: ForwardBatch) -> Any:
        first, second = self._on_each(lambda rank: self._ranks[rank].runner.compute(batch))
        second.result()
        return first.result()

    def wait(self, handle: Any) -> ForwardOutput:
        if handle.done is not None:
            handle.done.synchronize()
        return ForwardOutput(handle.token_ids_S.numpy())

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()

    def _on_each(self, work: Any) -> list[Future[Any]]:
        return [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]

    def _build(self, rank: int) -> RankEngine:
        group = HostGroup(Sharding(rank, 2), self._run_dir)
        model = load_model_config(self._path)
        return RankEngine(self._config, self._path, model, group, self._device)


@pytest.mark.also_cpu
@pytest.mark.parametrize(("arch", "variant"), ARCHITECTURES.items())
def test_two_ranks_on_one_device(
    tmp_path: Path, device: torch.device, arch: str, variant: dict[str, int]
) -> None:
    path = save_checkpoint(tmp_path / "model", arch, 128, vocab_size=VOCAB_SIZE, **variant)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert_greedy(path, TwoRanks(path, device, run_dir), device)


def assert_greedy(path: Path, engine: TwoRanks, device: torch.device) -> None:
    """The tokens of some prompts are the best ones of transformers."""
    driver: Any = StepDriver(engine)  # type: ignore[arg-type]
    prompts = make_prompts(4, VOCAB_SIZE, longest=60)
    sequences = [driver.add() for _ in prompts]
    steps = [driver.run(prefills=list(zip(sequences, prompts, strict=True)))]
    while len(steps) < 20:
        steps.append(driver.run(decodes=sequences))
    engine.close()
    assert_best_tokens(path, device, prompts, list(map(list, zip(*steps, strict=True))))


def assert_best_tokens(
    path: Path, device: torch.device, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    """Each token is not far behind the best one of transformers."""
    model = load(path, torch.float32, device)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = logits_of(model, [*prompt, *output])[len(prompt) - 1 : -1]
        for token, scores in zip(output, logits, strict=True):
            assert float(scores.max() - scores[token]) <= MARGIN


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cuda_graph_ranks": True},
        {"one_shot_all_reduce_kib": 256},
        {"cuda_graph_ranks": True, "one_shot_all_reduce_kib": 256},
    ],
    ids=["eager", "graphs", "one-shot", "one-shot-graphs"],
)
def test_two_ranks_on_two_gpus(
    tmp_path: Path, device: torch.device, options: dict[str, Any]
) -> None:
    path = save_checkpoint(tmp_path, "qwen3", 128, vocab_size=VOCAB_SIZE)
    config = ServerConfig(
        model=str(path), device="cuda", tp=2, num_pages=2000, max_prefill_tokens=64, **options
    )
    prompts = make_prompts(12, VOCAB_SIZE, longest=150)
    loop = build_loop(config, path, LocalChannel(), no_progress)
    assert isinstance(loop.engine, Engine)
    outputs, _ = run(loop, prompts, 8)
    loop.engine.close()
    assert_best_tokens(path, device, prompts, outputs)
