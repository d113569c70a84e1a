"""The engine: builds the model from a checkpoint, then turns each ForwardBatch into tokens."""

# Shapes: T tokens in the step, R sequences, S sequences that sample.

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.config import MAX_PREFILL_TOKENS, ServerConfig
from minisrv.engine.attention.base import AttentionBackend, LayerAttention
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.backends import (
    cache_dtype,
    choose_backends,
    device_kernels,
    keeps_fp8,
    new_recorder,
)
from minisrv.engine.cuda_memory import cuda_cache_bytes, largest_batch, measure_workspace
from minisrv.engine.device_step import DeviceStep
from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.decoder import Decoder
from minisrv.engine.layers.embedding import HEAD_NAME
from minisrv.engine.layers.rope import RotaryEmbedding
from minisrv.engine.memory import MemoryPlan, choose_num_pages, cpu_cache_bytes
from minisrv.engine.model_size import graph_bytes, graph_sizes
from minisrv.engine.models.registry import BLOCKS
from minisrv.engine.page_table import PageTable
from minisrv.engine.parallel.communicator import Communicator, NoPeers, Peers
from minisrv.engine.parallel.ranks import Ranks
from minisrv.engine.parallel.shard import Partition, check_divisible
from minisrv.engine.step_buffer import StepLimits
from minisrv.engine.step_runner import HostStep, Step, StepHandle
from minisrv.engine.weights import CheckpointWeights, DummyWeights, Progress, Weights
from minisrv.errors import ConfigError

_OVERLAP_DEPTH = {"cpu": 0, "cuda": 1}


class Engine:
    """A model with its weights, its KV cache and one row of state for each running request.

    Implements ForwardEngine. `max_prefill_tokens` and `overlap_depth` are the options as given, or
    what suits the device. Raises ConfigError for a checkpoint or a memory that does not do.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_dir: Path,
        model_config: ModelConfig,
        progress: Progress = lambda stage, fraction: None,
        run_dir: Path | None = None,
    ) -> None:
        check_divisible(model_config, config.tp)
        self._ranks = Ranks(config, model_dir, run_dir) if config.tp > 1 else None
        if self._ranks is not None:
            weakref.finalize(self, self._ranks.close)
        try:
            if self._ranks is None:
                self._build(config, model_dir, model_config, NoPeers(), progress)
                return
            self._ranks.wait_until_joining()
            with self._ranks.explained():
                peers = Peers(Partition(0, config.tp), self._ranks.run_dir, _device_of(config, 0))
                self._build(config, model_dir, model_config, peers, progress)
        except BaseException:
            self.close()
            raise

    @classmethod
    def follower(
        cls,
        config: ServerConfig,
        model_dir: Path,
        model_config: ModelConfig,
        rank: int,
        run_dir: Path,
    ) -> Engine:
        """The engine of a rank above 0, which meets the others in `run_dir`."""
        engine = cls.__new__(cls)
        engine._ranks = None
        peers = Peers(Partition(rank, config.tp), run_dir, _device_of(config, rank))
        engine._build(config, model_dir, model_config, peers, lambda stage, fraction: None)
        return engine

    def _build(
        self,
        config: ServerConfig,
        model_dir: Path,
        model_config: ModelConfig,
        peers: Communicator,
        progress: Progress,
    ) -> None:
        self._peers, self._device = peers, _device_of(config, peers.partition.rank)
        kind = self._device.type
        if kind == "cpu":
            cores = max(1, len(os.sched_getaffinity(0)) // config.tp)
            torch.set_num_threads(config.num_threads or cores)
        self.page_size, self.max_seq_len = config.page_size, model_config.max_seq_len
        self.max_prefill_tokens = config.max_prefill_tokens or MAX_PREFILL_TOKENS[kind]
        depth = config.overlap_depth
        self.overlap_depth = _OVERLAP_DEPTH[kind] if depth is None else depth
        weights = _open_weights(config, model_dir, model_config, self._device, progress)
        self.placement = f"{str(weights.dtype).removeprefix('torch.')} on {kind}"
        if model_config.fp8 is not None:
            kept = weights.keeps_fp8
            self.placement += ", FP8 products" if kept else ", dequantized from FP8"
        if config.tp > 1:
            self.placement += f", {config.tp} ranks"
        num_kv_heads = peers.partition.kv_heads(model_config).length
        stored_dtype = cache_dtype(config, weights)
        self._pool = KVPool(
            model_config, num_kv_heads, config.page_size, weights.dtype, self._device, stored_dtype
        )
        num_heads = peers.partition.query_heads(model_config).length
        kernels, attention = choose_backends(config, self._pool, num_heads)
        model = _build_model(model_config, weights, kernels, peers, attention)
        self._step = self._make_step(config, model, kernels, attention)
        sizes = self._sizes_to_record(config, model_config, kernels)
        self._plan = self._plan_memory(
            config, weights.num_bytes, graph_bytes(model_config, sizes, weights.dtype.itemsize)
        )
        self._allocate(self._plan.num_pages)
        if isinstance(self._step, DeviceStep) and sizes:
            self._step.record(sizes, new_recorder(), lambda done: progress("record graphs", done))
            progress("record graphs", 1.0)

    @property
    def num_pages(self) -> int:
        """Pages in the KV cache."""
        return self._pool.num_pages

    def describe(self) -> str:
        """The memory plan as a table."""
        return self._plan.describe()

    def launch(self, batch: ForwardBatch) -> StepHandle:
        """See ForwardEngine. On a CPU the step is done when this returns.

        Raises EngineDeadError when another rank has died.
        """
        if self._ranks is None:
            return self._step.compute(batch)
        self._ranks.send(batch)
        with self._ranks.explained():
            return self._step.compute(batch)

    def follow(self, batch: ForwardBatch) -> None:
        """Compute a step that rank 0 has launched."""
        self._step.compute(batch)

    def check(self) -> None:
        """Raise EngineDeadError when another rank has died."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """End the other ranks."""
        if self._ranks is not None:
            self._ranks.close()

    def wait(self, handle: StepHandle) -> ForwardOutput:
        """See ForwardEngine."""
        if handle.done is not None:
            handle.done.synchronize()
        scores = handle.scores
        return ForwardOutput(
            handle.token_ids_S.numpy(), None if scores is None else scores.arrays()
        )

    def compute_logits(self, batch: ForwardBatch) -> Tensor:
        """As `launch` without drawing: the logits [S, V] of the sequences that sample.

        For one rank alone: nobody tells the others of it.
        """
        assert self._ranks is None
        return self._step.logits(batch)

    def _make_step(
        self,
        config: ServerConfig,
        model: Decoder,
        kernels: Kernels,
        attention: AttentionBackend | FlashInferAttention,
    ) -> Step:
        num_rows, page_size = config.max_running_requests, config.page_size
        if isinstance(attention, FlashInferAttention):
            limits = StepLimits(num_rows, self.max_prefill_tokens, self.max_seq_len, page_size)
            return DeviceStep(model, attention, device_kernels(), self._peers, limits, self._device)
        page_table = PageTable(num_rows, self.max_seq_len, page_size)
        return HostStep(model, attention, kernels, self._peers, page_table, self._device)

    def _allocate(self, num_pages: int) -> None:
        """Take the cache; on a device that pads its steps, with a page for the padding."""
        if not isinstance(self._step, DeviceStep):
            self._pool.allocate(num_pages)
            return
        self._pool.allocate(num_pages, spare=1)
        self._step.pad_with(num_pages)

    def _sizes_to_record(
        self, config: ServerConfig, model_config: ModelConfig, kernels: Kernels
    ) -> list[int]:
        """Batch sizes of CUDA graphs. None between ranks: when one dies, a replay in which the
        others wait for it cannot be ended. None where torch chooses experts, on the host.
        """
        experts_on_host = model_config.moe is not None and kernels.run_experts is None
        if not isinstance(self._step, DeviceStep) or config.tp > 1 or experts_on_host:
            return []
        return graph_sizes(min(config.cuda_graph_max_bs, config.max_running_requests))

    def _plan_memory(self, config: ServerConfig, weight_bytes: int, graph_bytes: int) -> MemoryPlan:
        workspace = 0
        if self._device.type == "cpu":
            free_bytes, why = cpu_cache_bytes(config)
        else:
            workspace = measure_workspace(self._run_largest_step(config))
            free_bytes, why = cuda_cache_bytes(config, workspace + graph_bytes)
        page_bytes = self._pool.bytes_per_page
        num_pages = choose_num_pages(
            config,
            page_bytes=page_bytes,
            max_seq_len=self.max_seq_len,
            free_bytes=free_bytes,
            why=why,
        )
        return MemoryPlan(
            weights=weight_bytes,
            workspace=workspace,
            graphs=graph_bytes,
            num_pages=self._peers.minimum(num_pages),
            page_bytes=page_bytes,
            page_size=self.page_size,
            max_seq_len=self.max_seq_len,
        )

    def _run_largest_step(self, config: ServerConfig) -> Callable[[], object]:
        num_sequences = min(config.max_running_requests, self.max_prefill_tokens)
        batch = largest_batch(
            num_sequences,
            self.max_prefill_tokens,
            self.page_size,
            tells_logprobs=self._peers.partition.rank == 0,
        )
        self._allocate(batch.page_ids.size)
        return lambda: self.wait(self._step.compute(batch))


def _device_of(config: ServerConfig, rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device is cuda; torch finds no GPU here; run with --device cpu")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    if config.tp > torch.cuda.device_count():
        raise ConfigError(f"--tp is {config.tp}; torch finds {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _open_weights(
    config: ServerConfig,
    model_dir: Path,
    model_config: ModelConfig,
    device: torch.device,
    progress: Progress,
) -> Weights:
    name = model_config.dtype if config.dtype == "auto" else config.dtype
    dtype = None if name is None else getattr(torch, name)
    if config.load_format == "dummy":
        return DummyWeights(dtype=dtype, device=device)
    ignored = [HEAD_NAME] if model_config.tie_word_embeddings else []
    return CheckpointWeights(
        model_dir,
        dtype=dtype,
        device=device,
        ignored=ignored,
        fp8=model_config.fp8,
        keep_fp8=keeps_fp8(config, device, dtype),
        progress=progress,
    )


def _build_model(
    model_config: ModelConfig,
    weights: Weights,
    kernels: Kernels,
    peers: Communicator,
    attention: LayerAttention,
) -> Decoder:
    rope = RotaryEmbedding(
        model_config.rope,
        model_config.head_dim,
        model_config.max_seq_len,
        weights.dtype,
        weights.device,
    )
    build = BuildContext(model_config, weights, rope, kernels, peers, attention)
    with torch.inference_mode():
        model = Decoder(build, BLOCKS[model_config.architecture])
    weights.finish()
    return model
