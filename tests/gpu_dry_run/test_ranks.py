"""Two ranks issue the same collectives in the same order, whatever a step contains."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from torch import Tensor

from minisrv.checkpoint.model_config import load_model_config
from minisrv.engine.forward_batch import ForwardBatch, LogprobColumns
from minisrv.engine.parallel import communicator
from minisrv.engine.parallel.communicator import TPGroup
from minisrv.engine.parallel.plan_pipe import encode_plan, read_plans
from minisrv.engine.parallel.shard import Sharding
from minisrv.engine.rank_engine import RankEngine, choose_device
from tests.gpu_dry_run.dry_run import (
    MAX_SEQ_LEN,
    decode_batch,
    machine,
    server_config,
    step_batch,
    weights_of,
)
from tests.gpu_dry_run.fake_cuda import FakeGPU
from tests.gpu_dry_run.models import MODELS

Collective = tuple[str, tuple[int, ...], str]


class RecordedGroup:
    """A process group of NCCL that only notes what it is asked for."""

    def __init__(self, gpu: FakeGPU, rank: int, size: int) -> None:
        self._gpu, self._rank, self._size = gpu, rank, size
        self.collectives: list[Collective] = []

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> RecordedGroup:
        return self._note("allreduce", tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> RecordedGroup:
        return self._note("broadcast", tensors)

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None
    ) -> RecordedGroup:
        assert len(outputs) == (self._rank == 0)
        for output in outputs:
            assert [part.shape for part in output] == [inputs[0].shape] * self._size
            for part in output:
                self._check(part)
        return self._note("gather", inputs)

    def wait(self) -> bool:
        """NCCL's only has the stream wait."""
        return True

    def _note(self, name: str, tensors: list[Tensor]) -> RecordedGroup:
        (tensor,) = tensors
        self._check(tensor)
        self.collectives.append((name, tuple(tensor.shape), str(tensor.dtype)))
        self._gpu.launch(f"nccl::{name}")
        return self

    def _check(self, tensor: Tensor) -> None:
        self._gpu.require_on_device(tensor, "a tensor of a collective")
        assert tensor.is_contiguous()


def batches() -> list[ForwardBatch]:
    """The kinds of steps."""
    none, ones = np.empty(0, np.int32), np.arange(4, dtype=np.int32)
    scored = {
        "prompt_logprob_tokens": np.arange(4, 300, dtype=np.int32),
        "logprobs": LogprobColumns(5, ones, np.zeros(296, np.int32)),
    }
    many = [(i % 64, i) for i in range(2000)]
    return [
        decode_batch(1),
        decode_batch(64),
        decode_batch(64, adjusted=True),
        step_batch(num_decodes=20, chunks=[300, 7]),
        step_batch(num_decodes=0, chunks=[2048]),
        step_batch(num_decodes=4, chunks=[296], **scored),
        step_batch(num_decodes=4, chunks=[], logprobs=LogprobColumns(5, ones, none)),
        step_batch(num_decodes=64, chunks=[], columns={"suppress": many}),
    ]


def collectives_of(name: str, rank: int, folder: Path) -> list[list[Collective]]:
    """What one of two ranks issues: at the start, then in each step."""
    model = MODELS[name]
    directory = model.write(folder, 2)
    config = server_config(directory, model, tp=2, max_running_requests=64)
    with machine(num_devices=2) as found, weights_of(model, directory):
        group = RecordedGroup(found.gpu, rank, 2)
        with (
            mock.patch.object(communicator, "_nccl_group", return_value=group),
            mock.patch.object(TPGroup, "all_reduce_min", noting_minimum(group)),
        ):
            device = choose_device(config, rank)
            tp_group = TPGroup(Sharding(rank, 2), folder, device)
            model_config = load_model_config(directory, MAX_SEQ_LEN)
            engine = RankEngine(config, directory, model_config, tp_group, device)
            found.start_serving()
            issued = [list(group.collectives)]
            for batch in batches():
                group.collectives.clear()
                engine.runner.compute(batch if rank == 0 else as_sent(batch))
                issued.append(list(group.collectives))
            found.gpu.wait()
    return issued


def noting_minimum(group: RecordedGroup) -> Callable[[TPGroup, int], int]:
    """The minimum is read back, which only a device with contents can do."""

    def all_reduce_min(self: TPGroup, value: int) -> int:
        group.collectives.append(("minimum", (1,), "torch.int64"))
        return value

    return all_reduce_min


def as_sent(batch: ForwardBatch) -> ForwardBatch:
    """What a rank above 0 reads from its pipe."""
    (sent,) = read_plans(io.BytesIO(encode_plan(batch)))
    return sent


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    "name", ["Qwen3-0.6B", "Qwen3-14B", "Qwen3-30B-A3B", "Qwen3-8B-FP8-blocks"]
)
def test_both_ranks_issue_the_same_collectives(name: str, tmp_path: Path) -> None:
    first, second = (collectives_of(name, rank, tmp_path) for rank in (0, 1))
    assert first == second
    # One after the embedding and two per layer, then the logits and the tokens.
    names = [step[0] for step in first[1]]
    assert names == ["allreduce"] * 5 + ["gather", "broadcast"]
