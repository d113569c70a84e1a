"""The engine of one rank: its shard of the weights, its KV cache, and what runs its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from minisrv.checkpoint.gguf.files import find_gguf
from minisrv.checkpoint.model_config import ModelConfig
from minisrv.config import MAX_PREFILL_TOKENS, ServerConfig
from minisrv.engine.attention.base import LayerAttention
from minisrv.engine.attention.cpu_layers import join_layers
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.backends import (
    activation_dtype,
    cache_dtype,
    choose_backends,
    device_kernels,
    keeps_fp8,
    new_recorder,
)
from minisrv.engine.cuda_memory import cuda_cache_bytes, largest_batch, measure_workspace
from minisrv.engine.device_runner import DeviceRunner
from minisrv.engine.graph_shapes import GraphShape
from minisrv.engine.host_runner import HostRunner
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kernels.cpu import CpuKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.decoder import Decoder
from minisrv.engine.layers.rope import RotaryEmbedding
from minisrv.engine.memory import (
    MemoryPlan,
    available_memory,
    choose_num_pages,
    cpu_cache_bytes,
)
from minisrv.engine.model_size import graph_bytes, graph_shapes
from minisrv.engine.models.registry import BLOCKS
from minisrv.engine.page_table import PageTable
from minisrv.engine.parallel.communicator import Communicator, PeerFailedError
from minisrv.engine.parallel.one_shot import check_one_shot, check_one_shot_dtype
from minisrv.engine.quantization import check_quantization
from minisrv.engine.sampling.adjust import LogitAdjuster
from minisrv.engine.step_buffer import StepLimits
from minisrv.engine.threads import ThreadGovernor, usable_cores
from minisrv.engine.weights import CheckpointWeights, DummyWeights, Weights
from minisrv.errors import ConfigError
from minisrv.start_progress import ReportProgress, no_progress

_OVERLAP_DEPTH = {"cpu": 0, "cuda": 1}
# Prompts served before the first request. On a GPU: one for each size of the tiles of our kernels,
# which are compiled when they are first used.
_WARM_UP_LENS = {"cpu": (8,), "cuda": (1, 17, 65, 513)}
_RECORDING = "record graphs"


class RankEngine:
    """Builds this rank's shard of the model and sizes the KV cache; `runner` computes the steps.

    All ranks must be built at the same time: they agree on the number of pages. Raises ConfigError
    if the checkpoint or the memory does not suit the config, PeerFailedError if that of another
    rank does not.
    """

    runner: HostRunner | DeviceRunner

    def __init__(
        self,
        config: ServerConfig,
        model_dir: Path,
        model_config: ModelConfig,
        communicator: Communicator,
        device: torch.device,
        progress: ReportProgress = no_progress,
    ) -> None:
        num_threads = config.num_threads or max(1, usable_cores() // config.tp)
        if device.type == "cpu":
            torch.set_num_threads(num_threads)
        self.max_prefill_tokens = config.max_prefill_tokens or MAX_PREFILL_TOKENS[device.type]
        depth = config.overlap_depth
        self.overlap_depth = _OVERLAP_DEPTH[device.type] if depth is None else depth
        weights = _open_weights(config, model_dir, model_config, device, progress)
        check_one_shot_dtype(config, weights.dtype)
        self.placement = _describe_placement(config, model_config, weights)
        self._communicator, sharding = communicator, communicator.sharding
        self._vocab_size = model_config.vocab_size
        self._pool = KVPool(
            model_config,
            sharding.kv_heads(model_config).length,
            config.page_size,
            weights.dtype,
            device,
            cache_dtype(config, model_config, weights),
        )
        num_heads = sharding.query_heads(model_config).length
        kernels, attention = choose_backends(config, self._pool, num_heads)
        model = _build_model(model_config, weights, kernels, communicator, attention)
        num_rows, max_seq_len = config.max_running_requests, model_config.max_seq_len
        counted_rows = num_rows if sharding.rank == 0 else 0  # only rank 0 has all the logits
        adjuster = LogitAdjuster(kernels, counted_rows, model_config.vocab_size, device)
        if isinstance(attention, FlashInferAttention):
            limits = StepLimits(num_rows, self.max_prefill_tokens, max_seq_len, config.page_size)
            self.runner = device_runner = DeviceRunner(
                model, attention, device_kernels(), communicator, limits, adjuster, device
            )
            shapes = _shapes_to_record(config, model_config, kernels, limits)
        else:
            table = PageTable(num_rows, max_seq_len, config.page_size)
            change = partial(_set_threads, kernels)
            governor = ThreadGovernor(num_threads, change) if device.type == "cpu" else None
            self.runner = HostRunner(
                model, attention, kernels, communicator, table, adjuster, device, governor
            )
            shapes = []
        self.memory_plan = self._plan_memory(
            config,
            max_seq_len,
            weights=weights.num_bytes,
            token_counts=adjuster.num_bytes,
            graphs=graph_bytes(model_config, shapes, weights.dtype.itemsize),
        )
        model.shorten(self.memory_plan.num_pages * config.page_size)
        self._allocate_cache(self.memory_plan.num_pages)
        if shapes:
            recording = partial(progress, _RECORDING, total=len(shapes), unit="graph")
            device_runner.record(shapes, new_recorder(), recording)

    @property
    def warm_up_lens(self) -> tuple[int, ...]:
        return _WARM_UP_LENS[self._pool.device.type]

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def bytes_left(self) -> int:
        """Memory that is free: of the GPU, or of the machine less pages that will be mapped."""
        if self._pool.device.type == "cuda":
            return torch.cuda.mem_get_info(self._pool.device)[0]
        return max(0, available_memory() - self._pool.unmapped_bytes)

    def close(self) -> None:
        """Release what must not outlive the communicator; no step can be computed any more."""
        if isinstance(self.runner, DeviceRunner):
            self.runner.close()

    def _allocate_cache(self, num_pages: int) -> None:
        """A DeviceRunner gets one page more, for padding."""
        if isinstance(self.runner, DeviceRunner):
            self._pool.allocate(num_pages, spare=1)
            self.runner.pad_with(num_pages)
        else:
            self._pool.allocate(num_pages)

    def _plan_memory(
        self,
        config: ServerConfig,
        max_seq_len: int,
        *,
        weights: int,
        token_counts: int,
        graphs: int,
    ) -> MemoryPlan:
        workspace, on_cpu = 0, self._pool.device.type == "cpu"
        if on_cpu:
            free_bytes, why = cpu_cache_bytes(config)
        else:
            workspace = self._measure_largest_step(config)
            free_bytes, why = cuda_cache_bytes(config, workspace + graphs)
        page_bytes = self._pool.bytes_per_page
        choose = partial(
            choose_num_pages,
            config,
            page_bytes=page_bytes,
            max_seq_len=max_seq_len,
            free_bytes=free_bytes,
            why=why,
        )
        return MemoryPlan(
            weights=weights,
            token_counts=token_counts,
            workspace=workspace,
            graphs=graphs,
            num_pages=agree_on_pages(self._communicator, choose),
            page_bytes=page_bytes,
            page_size=config.page_size,
            max_seq_len=max_seq_len,
            notes={"token counts": f"for penalties{', taken as requests need it' * on_cpu}"},
        )

    def _measure_largest_step(self, config: ServerConfig) -> int:
        """Bytes that the largest step allocates. Leaves a small cache behind."""
        batch = largest_batch(
            min(config.max_running_requests, self.max_prefill_tokens),
            self.max_prefill_tokens,
            config.page_size,
            self._vocab_size,
            on_rank_0=self._communicator.sharding.rank == 0,
        )
        self._allocate_cache(batch.page_ids.size)
        return measure_workspace(lambda: self.runner.compute(batch))


def agree_on_pages(communicator: Communicator, choose: Callable[[], int]) -> int:
    """The smallest of the numbers that the ranks `choose`.

    If `choose` raises ConfigError on one rank, the others raise PeerFailedError at once.
    """
    try:
        num_pages = choose()
    except ConfigError:
        communicator.all_reduce_min(0)
        raise
    smallest = communicator.all_reduce_min(num_pages)
    if not smallest:
        raise PeerFailedError("another rank has no memory for the KV cache")
    return smallest


def choose_device(config: ServerConfig, rank: int) -> torch.device:
    """The device of a rank, made torch's current one.

    Raises ConfigError if it does not exist or cannot sum over the ranks as the options say.
    """
    device = _find_device(config, rank)
    check_one_shot(config, rank, device)
    return device


def _find_device(config: ServerConfig, rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("--device is cuda, but torch finds no GPU; use --device cpu")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    if config.tp > torch.cuda.device_count():
        raise ConfigError(
            f"--tp is {config.tp}, but torch finds only {torch.cuda.device_count()} GPUs"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _set_threads(kernels: Kernels, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    if isinstance(kernels, CpuKernels):
        kernels.num_threads = num_threads


def _describe_placement(config: ServerConfig, model_config: ModelConfig, weights: Weights) -> str:
    """Such as "bfloat16 on cuda, 2 ranks"."""
    placement = f"{str(weights.dtype).removeprefix('torch.')} on {weights.device.type}"
    if config.quantization != "none":
        placement += f", {config.quantization} weights"
    if model_config.packed is not None:
        kinds = ", ".join(model_config.packed.kinds)
        placement += f", {'' if weights.packs else 'dequantized from '}{kinds}"
    if model_config.fp8 is not None:
        placement += ", FP8 products" if weights.keeps_fp8 else ", dequantized from FP8"
    return placement if config.tp == 1 else f"{placement}, {config.tp} ranks"


def _shapes_to_record(
    config: ServerConfig, model_config: ModelConfig, kernels: Kernels, limits: StepLimits
) -> list[GraphShape]:
    """Shapes of steps to record as CUDA graphs.

    None if the experts are chosen by torch, which does that on the host.
    """
    experts_on_host = model_config.moe is not None and kernels.run_experts is None
    if experts_on_host:
        return []
    return graph_shapes(config, limits.num_prefill_tokens, limits.max_seq_len)


def _open_weights(
    config: ServerConfig,
    model_dir: Path,
    model_config: ModelConfig,
    device: torch.device,
    progress: ReportProgress,
) -> Weights:
    check_quantization(config, model_config, device.type)
    dtype = activation_dtype(config, model_config, device)
    if config.load_format == "dummy":
        return DummyWeights(dtype=dtype, device=device, quantization=config.quantization)
    if find_gguf(model_dir):
        # Imports the package `gguf`, which nothing else of an engine needs.
        from minisrv.engine.gguf_weights import GgufWeights

        assert dtype is not None
        return GgufWeights(
            model_dir,
            model_config,
            dtype=dtype,
            device=device,
            quantization=config.quantization,
            progress=progress,
        )
    return CheckpointWeights(
        model_dir,
        dtype=dtype,
        device=device,
        fp8=model_config.fp8,
        keep_fp8=keeps_fp8(config, device, dtype),
        quantization=config.quantization,
        progress=progress,
    )


def _build_model(
    model_config: ModelConfig,
    weights: Weights,
    kernels: Kernels,
    communicator: Communicator,
    attention: LayerAttention,
) -> Decoder:
    rope = RotaryEmbedding(
        model_config.rope,
        model_config.head_dim,
        model_config.max_seq_len,
        weights.dtype,
        weights.device,
    )
    build = BuildContext(model_config, weights, rope, kernels, communicator, attention)
    with torch.inference_mode():
        model = Decoder(build, BLOCKS[model_config.architecture])
    weights.finish()
    model.run_layers = join_layers(model.dense_layers(), attention)
    return model
