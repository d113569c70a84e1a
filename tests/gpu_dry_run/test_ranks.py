"""Two ranks issue the same collectives in the same order, whatever a step contains."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from minisrv.checkpoint.model_config import load_model_config
from minisrv.engine import model_size
from minisrv.engine.forward_batch import ForwardBatch, LogprobColumns
from minisrv.engine.parallel import communicator, one_shot
from minisrv.engine.parallel.communicator import TPGroup
from minisrv.engine.parallel.one_shot import OneShotAllReduce
from minisrv.engine.parallel.plan_pipe import encode_plan, read_plans
from minisrv.engine.parallel.shard import Sharding
from minisrv.engine.rank_engine import RankEngine, choose_device
from tests.gpu_dry_run.dry_run import (
    MAX_SEQ_LEN,
    decode_batch,
    machine,
    penalties,
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
        return self._launch("allreduce", tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> RecordedGroup:
        return self._launch("broadcast", tensors)

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None
    ) -> RecordedGroup:
        assert len(outputs) == (self._rank == 0)
        for output in outputs:
            assert [part.shape for part in output] == [inputs[0].shape] * self._size
            for part in output:
                self._check(part)
        return self._launch("gather", inputs)

    def wait(self) -> bool:
        """NCCL's only has the stream wait."""
        return True

    def _launch(self, name: str, tensors: list[Tensor]) -> RecordedGroup:
        self.note(name, tensors)
        self._gpu.launch(f"nccl::{name}")
        return self

    def note(self, name: str, tensors: list[Tensor]) -> None:
        """One that is recorded in a graph is issued each time that this is replayed."""
        (tensor,) = tensors
        self._check(tensor)
        noted = name, tuple(tensor.shape), str(tensor.dtype)
        graph = self._gpu.recording
        if graph is None:
            self.collectives.append(noted)
        else:
            self.collectives.append((f"record {name}", *noted[1:]))
            graph.checks.append(lambda: self.collectives.append(noted))

    def _check(self, tensor: Tensor) -> None:
        self._gpu.require_on_device(tensor, "a tensor of a collective")
        assert tensor.is_contiguous()


class SharedMemory:
    """Symmetric memory of two ranks, as far as torch's functions are called to make it."""

    def __init__(self, gpu: FakeGPU, rank: int) -> None:
        self._gpu, self._rank, self._names = gpu, rank, list[str]()

    def set_group_info(self, name: str, rank: int, size: int, store: Any) -> None:
        assert (rank, size) == (self._rank, 2)
        assert name not in self._names
        assert isinstance(store, torch.distributed.PrefixStore)
        self._names.append(name)

    def empty_strided_p2p(
        self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, name: str
    ) -> Tensor:
        assert name in self._names
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def rendezvous(self, memory: Tensor, name: str) -> None:
        self._gpu.require_on_device(memory, "symmetric memory")
        assert name in self._names


def noting_one_shot(group: RecordedGroup) -> Callable[[OneShotAllReduce, Tensor], Tensor]:
    """What the kernel requires of its tensors: see SymmetricMemory's CUDA operators in torch."""
    real = OneShotAllReduce.__call__

    def sum_over_ranks(one_shot: OneShotAllReduce, x: Tensor) -> Tensor:
        group.note("one-shot", [x])
        assert x.dtype in (torch.bfloat16, torch.float32)
        assert x.data_ptr() % 16 == x.nbytes % 16 == 0
        assert x.nbytes <= one_shot._memory.nbytes
        return real(one_shot, x)

    return sum_over_ranks


def batches() -> list[ForwardBatch]:
    """The kinds of steps."""
    none, ones = np.empty(0, np.int32), np.arange(4, dtype=np.int32)
    scored = {
        "prompt_logprob_tokens": np.arange(4, 300, dtype=np.int32),
        "logprobs": LogprobColumns(5, ones, np.zeros(296, np.int32)),
    }
    many = [(i % 64, i) for i in range(2000)]
    # Of the biases beyond the room in the words of a step, a rank above 0 knows nothing.
    biased = replace(
        penalties(50),
        bias_samples=np.zeros(300, np.int32),
        bias_ids=np.arange(300, dtype=np.int32),
        bias_values=np.ones(300, np.float32),
    )
    return [
        decode_batch(1),
        decode_batch(64),
        decode_batch(64, adjusted=True),
        step_batch(num_decodes=20, chunks=[300, 7]),
        step_batch(num_decodes=0, chunks=[2048]),
        step_batch(num_decodes=4, chunks=[296], **scored),
        step_batch(num_decodes=4, chunks=[], logprobs=LogprobColumns(5, ones, none)),
        step_batch(num_decodes=64, chunks=[], columns={"suppress": many}),
        step_batch(num_decodes=50, chunks=[], penalties=biased),
    ]


@dataclass(frozen=True)
class RankRun:
    """What one of two ranks has issued: at the start, then in each step."""

    issued: list[list[Collective]]
    num_replays: int
    graphs_left: int


def run_rank(name: str, rank: int, folder: Path, **options: Any) -> RankRun:
    model = MODELS[name]
    directory = model.write(folder, 2)
    config = server_config(directory, model, tp=2, max_running_requests=64, **options)
    with machine(num_devices=2) as found, weights_of(model, directory):
        group = RecordedGroup(found.gpu, rank, 2)
        with (
            mock.patch.object(communicator, "_nccl_group", return_value=group),
            mock.patch.object(TPGroup, "all_reduce_min", noting_minimum(group)),
            mock.patch.object(one_shot, "SymmetricMemory", SharedMemory(found.gpu, rank)),
            mock.patch.object(OneShotAllReduce, "__call__", noting_one_shot(group)),
        ):
            device = choose_device(config, rank)
            tp_group = TPGroup(Sharding(rank, 2), folder, device, config.one_shot_all_reduce_kib)
            model_config = load_model_config(directory, MAX_SEQ_LEN)
            engine = RankEngine(config, directory, model_config, tp_group, device)
            found.start_serving()
            issued = [list(group.collectives)]
            for batch in batches():
                group.collectives.clear()
                engine.runner.compute(batch if rank == 0 else as_sent(batch))
                issued.append(list(group.collectives))
            found.gpu.wait()
            engine.close()
            return RankRun(issued, found.gpu.num_replays, len(found.gpu.graphs))


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


NAMES = ["Qwen3-0.6B", "Qwen3-14B", "Qwen3-30B-A3B", "Qwen3-8B-FP8-blocks"]
GRAPHS = [1, 64]


def run_both(name: str, folder: Path, **options: Any) -> list[RankRun]:
    """Both ranks must issue the same."""
    runs = [run_rank(name, rank, folder, **options) for rank in (0, 1)]
    assert runs[0].issued == runs[1].issued
    # One after the embedding and two per layer, then the logits and the tokens.
    names = [step[0] for step in runs[0].issued[1]]
    assert names == ["allreduce"] * 5 + ["gather", "broadcast"]
    return runs


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    "name",
    [
        *("Qwen3-0.6B", "Qwen3-8B-FP8-blocks"),
        *(pytest.param(n, marks=pytest.mark.soak) for n in ("Qwen3-14B", "Qwen3-30B-A3B")),
    ],
)
def test_both_ranks_issue_the_same_collectives(name: str, tmp_path: Path) -> None:
    assert [run.num_replays for run in run_both(name, tmp_path)] == [0, 0]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    ("name", "max_tokens"),
    [
        ("Qwen3-0.6B", 0),
        *(pytest.param(name, 512, marks=pytest.mark.soak) for name in NAMES),
    ],
)
def test_both_ranks_issue_the_same_collectives_in_graphs(
    name: str, max_tokens: int, tmp_path: Path
) -> None:
    options = {"cuda_graph_ranks": True, "cuda_graph_max_tokens": max_tokens}
    with mock.patch.object(model_size, "graph_sizes", return_value=GRAPHS):
        runs = run_both(name, tmp_path, **options)
    recorded = sum(kind == "record gather" for kind, _, _ in runs[0].issued[0])
    assert recorded == len(GRAPHS) if not max_tokens else recorded > 10
    # Each once at the start. Where all biases do not fit into the words of a step, it samples
    # without a graph, and rank 0 has more of them.
    replays = recorded + 10 + 2 * bool(max_tokens)
    assert [run.num_replays for run in runs] == [replays, replays + 1]
    assert not any(run.graphs_left for run in runs), "NCCL's communicator would wait for them"


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    "in_graphs", [True, pytest.param(False, marks=pytest.mark.soak)], ids=["graphs", "eager"]
)
def test_both_ranks_sum_small_tensors_in_one_launch(in_graphs: bool, tmp_path: Path) -> None:
    """Steps of up to 64 tokens; larger ones are left to NCCL."""
    options = {"one_shot_all_reduce_kib": 64 * 1024 * 2 // 2**10, "cuda_graph_ranks": in_graphs}
    with mock.patch.object(model_size, "graph_sizes", return_value=GRAPHS):
        first, second = (run_rank("Qwen3-0.6B", rank, tmp_path, **options) for rank in (0, 1))
    assert first.issued == second.issued
    for issued, kind in ((first.issued[2], "one-shot"), (first.issued[4], "allreduce")):
        assert [name for name, _, _ in issued] == [kind] * 5 + ["gather", "broadcast"]
