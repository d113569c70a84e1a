"""The real engine and the real loop, started on a fake GPU and ready to serve."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from minisrv.checkpoint.model_config import Fp8Config, load_model_config
from minisrv.config import ServerConfig
from minisrv.engine import rank_engine
from minisrv.engine.forward_batch import ForwardBatch, Penalties
from minisrv.engine.fp8 import Fp8Matrix, read_matrix
from minisrv.engine.parallel.shard import Shard
from minisrv.engine.weights import DummyWeights
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.start_progress import no_progress
from minisrv.structured_output.vocabulary import Vocabulary
from minisrv.wire.messages import Finish, GenerateMsg
from tests.gpu_dry_run.fake_attention import Plans
from tests.gpu_dry_run.fake_cuda import FakeGPU, fake_cuda
from tests.gpu_dry_run.fake_flashinfer import fake_flashinfer
from tests.gpu_dry_run.models import Model
from tests.gpu_dry_run.planner import load_planner
from tests.support.step_driver import sampling_columns

if TYPE_CHECKING:
    from tests.gpu_dry_run.fake_triton import Kernels

MAX_SEQ_LEN = 4096
_TURNS = 10_000


@dataclass(frozen=True)
class Machine:
    """A fake GPU with the libraries on it."""

    gpu: FakeGPU
    plans: Plans
    kernels: Kernels

    def start_serving(self) -> None:
        """From now on the host may not wait for the device, and new kernels are late."""
        self.gpu.serving = True
        self.kernels.start_serving()


@contextmanager
def machine(num_devices: int = 1) -> Iterator[Machine]:
    """Within the context this process has GPUs. Raises planner.Unavailable."""
    from tests.gpu_dry_run.fake_triton import fake_triton  # Triton exists only on Linux

    planner, gpu = load_planner(), FakeGPU(num_devices)
    with ExitStack() as stack:
        stack.enter_context(fake_cuda(gpu))
        plans = stack.enter_context(fake_flashinfer(gpu, planner))
        yield Machine(gpu, plans, stack.enter_context(fake_triton(gpu)))


def server_config(folder: Path, model: Model, **options: Any) -> ServerConfig:
    return ServerConfig(
        **{
            "model": str(folder),
            "device": "cuda",
            "load_format": "dummy",
            "max_seq_len": MAX_SEQ_LEN,
            **model.options,
            **options,
        }
    )


@dataclass(frozen=True)
class DryRun:
    """A model that serves."""

    machine: Machine
    loop: SchedulerLoop

    def serve(self, messages: Sequence[GenerateMsg]) -> dict[int, Finish]:
        """How each choice ended; two requests arrive per turn.

        All tokens must be those that the samplers "drew".
        """
        channel, ends, coming = self.loop.channel, dict[int, Finish](), deque(messages)
        for _ in range(_TURNS):
            channel.inbox.extend(coming.popleft() for _ in range(min(2, len(coming))))
            if not (self.loop.busy or channel.inbox):
                return ends
            self.loop.turn()
            self.loop.scheduler.check()
            while channel.outbox:
                step = channel.outbox.popleft()
                assert not step.failures, step.failures
                assert set(step.token_ids.tolist()) <= {self.machine.gpu.next_token, -1}
                columns = zip(step.uids.tolist(), step.finishes.tolist(), strict=True)
                ends.update({uid: Finish(end) for uid, end in columns if end})
        raise AssertionError("the loop does not come to an end")

    def launches(self, batch: ForwardBatch) -> Counter[str]:
        """What a step launches, by name."""
        self.machine.gpu.launches.clear()
        self.loop.engine.wait(self.loop.engine.launch(batch))
        return Counter(self.machine.gpu.launches)


@contextmanager
def dry_run(
    model: Model,
    folder: Path,
    *,
    num_layers: int | None = 2,
    vocabulary: Vocabulary | None = None,
    **options: Any,
) -> Iterator[DryRun]:
    """Start the model with its first layers only (None: all); `options` are server options."""
    directory = model.write(folder, num_layers)
    config = server_config(directory, model, **options)
    with machine() as found, weights_of(model, directory):
        channel = LocalChannel()
        loop = build_loop(config, directory, channel, no_progress, vocabulary=vocabulary)
        found.start_serving()
        yield DryRun(found, loop)


@contextmanager
def weights_of(model: Model, directory: Path) -> Iterator[None]:
    """Within the context, dummy weights of an FP8 model are in FP8."""
    fp8 = load_model_config(directory, MAX_SEQ_LEN).fp8
    if fp8 is None:
        yield
        return

    def open_weights(**options: Any) -> _Fp8Weights:
        return _Fp8Weights(fp8, **options)

    with mock.patch.object(rank_engine, "DummyWeights", open_weights):
        yield


class _Fp8Weights(DummyWeights):
    """Matrices as CheckpointWeights returns those of an FP8 checkpoint; routers are not in FP8."""

    def __init__(self, fp8: Fp8Config, **options: Any) -> None:
        super().__init__(**options)
        self._fp8, self.keeps_fp8 = fp8, True

    def load_matrix(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor | Fp8Matrix:
        if name.endswith(".mlp.gate.weight"):
            return self.load_tensor(name, shape, shard)
        values = torch.empty(tuple(shape), dtype=torch.float8_e4m3fn, device=self.device)
        if shard is not None:
            values = values.narrow(shard.dim, shard.start, shard.length).contiguous()
        outputs, inputs = shape
        rows, columns = self._fp8.block or (1, inputs)
        scale = torch.ones(-(-outputs // rows), -(-inputs // columns))
        matrix = read_matrix(name, values, scale, (outputs, inputs), shard, self._fp8)
        self.num_bytes += matrix.num_bytes
        return matrix.to(self.device)


def decode_batch(size: int, *, adjusted: bool = False, start: int = 700) -> ForwardBatch:
    """A decode step of `size` rows; `adjusted`: with every filter and penalty on every row."""
    return step_batch(
        num_decodes=size,
        chunks=[],
        start=start,
        columns={"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05} if adjusted else {},
        penalties=penalties(size) if adjusted else None,
    )


def step_batch(
    *,
    num_decodes: int,
    chunks: Sequence[int],
    start: int = 0,
    columns: dict[str, Any] | None = None,
    **fields: Any,
) -> ForwardBatch:
    """Decodes and prefill chunks of these lengths; all of them sample.

    start: tokens that each sequence has in the cache. `fields` are further ones of the batch.
    """
    size = num_decodes + len(chunks)
    rows = np.arange(size, dtype=np.int32)
    query_lens = np.array([1] * num_decodes + list(chunks), np.int32)
    return ForwardBatch(
        step_id=1,
        num_decodes=num_decodes,
        rows=rows,
        query_lens=query_lens,
        start_positions=np.full(size, start, np.int32),
        prefill_ids=np.zeros(sum(chunks), np.int32),
        page_rows=rows,
        page_columns=np.full(size, start // 16, np.int32),
        page_ids=rows,
        sample_indices=rows,
        sampling=sampling_columns(size, **(columns or {})),
        **fields,
    )


def penalties(size: int) -> Penalties:
    """Of rows that have sampled before."""
    rows, none = np.arange(size, dtype=np.int32), np.empty(0, np.int32)
    half = np.full(size, 0.5, np.float32)
    return Penalties(
        samples=rows,
        rows=rows,
        presence=half,
        frequency=half,
        repetition=half,
        begin_rows=none,
        begin_lens=none,
        begin_prompt_lens=none,
        begin_ids=none,
        bias_samples=none,
        bias_ids=none,
        bias_values=np.empty(0, np.float32),
    )
