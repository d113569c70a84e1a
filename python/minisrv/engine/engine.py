"""The engine: the model on all of its ranks, which turns each ForwardBatch into tokens."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.config import ServerConfig
from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.engine.kernels import compiler
from minisrv.engine.parallel.communicator import SingleRank, TPGroup
from minisrv.engine.parallel.ranks import Ranks
from minisrv.engine.parallel.shard import Sharding, check_divisible
from minisrv.engine.rank_engine import RankEngine, choose_device
from minisrv.engine.step_runner import StepHandle
from minisrv.start_progress import ReportProgress, no_progress

_POLL_S = 50e-6


class Engine:
    """A ForwardEngine: rank 0 in this process, and the processes of the other ranks.

    `max_prefill_tokens` and `overlap_depth` are the configured values, or the device's defaults.
    `warm_up_lens` are the lengths of the prompts to serve before the first request.
    Raises ConfigError if the checkpoint, the device or its memory does not suit the config.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_dir: Path,
        model_config: ModelConfig,
        progress: ReportProgress = no_progress,
        run_dir: Path | None = None,
    ) -> None:
        check_divisible(model_config, config.tp)
        device = choose_device(config, 0)
        self._ranks: Ranks | None = None
        with compiler.reporting_to(progress):
            rank_0 = self._build(config, model_dir, model_config, device, progress, run_dir)
        self._rank_0 = rank_0
        weakref.finalize(self, _close, rank_0, self._ranks)
        self.page_size, self.max_seq_len = config.page_size, model_config.max_seq_len
        self.num_pages, self.placement = rank_0.num_pages, rank_0.placement
        self.max_prefill_tokens = rank_0.max_prefill_tokens
        self.overlap_depth = rank_0.overlap_depth
        self.warm_up_lens = rank_0.warm_up_lens
        self.memory_plan = rank_0.memory_plan

    def _build(
        self,
        config: ServerConfig,
        model_dir: Path,
        model_config: ModelConfig,
        device: torch.device,
        progress: ReportProgress,
        run_dir: Path | None,
    ) -> RankEngine:
        """Rank 0, together with the processes of the others."""
        if config.tp == 1:
            return RankEngine(config, model_dir, model_config, SingleRank(), device, progress)
        self._ranks = Ranks(config, model_dir, run_dir)
        try:
            self._ranks.wait_until_joining()
            with self._ranks.explaining_failures():
                group = TPGroup(
                    Sharding(0, config.tp),
                    self._ranks.run_dir,
                    device,
                    config.one_shot_all_reduce_kib,
                )
                self._ranks.on_death(group.abort)
                rank_0 = RankEngine(config, model_dir, model_config, group, device, progress)
            self._ranks.check()  # what an aborted operation has returned means nothing
        except BaseException:
            self._ranks.close()
            raise
        return rank_0

    def describe(self) -> str:
        """The memory plan as a table, with what is left now."""
        return replace(self.memory_plan, left=self._rank_0.bytes_left).describe()

    def launch(self, batch: ForwardBatch) -> StepHandle:
        """On a CPU the step has finished when this returns.

        Raises EngineDeadError if another rank has died.
        """
        if self._ranks is None:
            return self._rank_0.runner.compute(batch)
        self._ranks.send_plan(batch)
        with self._ranks.explaining_failures():
            return self._rank_0.runner.compute(batch)

    def wait(self, handle: StepHandle) -> ForwardOutput:
        """Block until the step is done. Raises EngineDeadError if another rank has died."""
        if handle.done is not None:
            self._wait_for(handle.done)
        logprobs = handle.logprobs
        return ForwardOutput(
            handle.token_ids_S.numpy(), None if logprobs is None else logprobs.to_numpy()
        )

    def _wait_for(self, done: Any) -> None:
        """Wait for an event; with several ranks, not longer than all of them live.

        When one dies, `Ranks` aborts the operations that wait for it, but that may take its time.
        """
        if self._ranks is None:
            done.synchronize()
            return
        with self._ranks.explaining_failures():
            while not done.query():
                self._ranks.check()
                time.sleep(_POLL_S)
        self._ranks.check()  # an aborted step is done, too

    def check(self) -> None:
        """Raise EngineDeadError if another rank has died."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        _close(self._rank_0, self._ranks)

    def compute_logits(self, batch: ForwardBatch) -> Tensor:
        """Run the forward without sampling: logits [S, V] of the sequences that sample.

        Single rank only, because the step is not sent to other ranks.
        """
        assert self._ranks is None
        return self._rank_0.runner.logits(batch)


def _close(rank_0: RankEngine, ranks: Ranks | None) -> None:
    """Also when the program ends: the operations of a rank that has died end with the graphs."""
    rank_0.close()
    if ranks is not None:
        ranks.close()
