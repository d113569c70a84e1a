"""Selects operators and attention by device, dtype and options."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.config import ServerConfig
from minisrv.engine.attention.base import AttentionBackend
from minisrv.engine.attention.cpu import CpuAttention
from minisrv.engine.attention.decode_kernels import unsupported_decode_kernel
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.attention.workspace import workspace_bytes
from minisrv.engine.cuda_graph import CudaGraphRecorder, Recorder
from minisrv.engine.device_runner import DeviceKernels
from minisrv.engine.flashinfer_library import import_flashinfer
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kernels.cpu import ATTENTION_HEAD_DIMS, load_cpu_kernels
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.model_size import largest_chunk_graph, largest_graph
from minisrv.engine.quantization import has_packed_weights
from minisrv.engine.weights import Weights
from minisrv.errors import ConfigError

FLASHINFER_DTYPES = (torch.bfloat16, torch.float16)
FLASHINFER_HEAD_DIMS = (64, 128, 256)

logger = logging.getLogger("minisrv.engine")


def choose_backends(
    config: ServerConfig, pool: KVPool, num_heads: int
) -> tuple[Kernels, AttentionBackend | FlashInferAttention]:
    """The fastest available ones; logs a warning when falling back to torch.

    num_heads: query heads of this rank. Raises ConfigError for FlashInfer on a CPU, and for a
    --decode-kernel that cannot be used.
    """
    if pool.device.type == "cuda":
        return _cuda_backends(config, pool, num_heads)
    if config.attention_backend == "flashinfer":
        raise ConfigError("--attention-backend flashinfer requires a GPU, but the device is a CPU")
    if config.decode_kernel != "auto":
        raise ConfigError(
            f"--decode-kernel {config.decode_kernel} requires a GPU, but the device is a CPU"
        )
    if pool.stored_dtype is torch.float8_e4m3fn:
        logger.warning(
            "using torch's operators, which are slower: there are none for an FP8 cache on a CPU"
        )
        return TorchKernels(), TorchNativeAttention(pool)
    compiled = None
    if config.kernels == "auto":
        compiled = load_cpu_kernels(pool.dtype, pool.stored_dtype)
    kernels: Kernels = compiled or TorchKernels()
    if compiled and config.attention_backend == "auto" and pool.head_dim in ATTENTION_HEAD_DIMS:
        return kernels, CpuAttention(pool, compiled)
    return kernels, TorchNativeAttention(pool)


def device_kernels() -> DeviceKernels:
    """The Triton kernels of a DeviceRunner. Raises ImportError if triton is not installed."""
    from minisrv.engine.kernels.triton_expand import expand
    from minisrv.engine.kernels.triton_mask import mask_logits
    from minisrv.engine.kernels.triton_sample import sample_on_device

    return DeviceKernels(expand, sample_on_device, mask_logits)


def new_recorder() -> Recorder:
    """Called once per model, as its graphs share memory."""
    return CudaGraphRecorder()


def activation_dtype(
    config: ServerConfig, model: ModelConfig, device: torch.device
) -> torch.dtype | None:
    """None if neither the options nor the checkpoint state it.

    Packed weights are multiplied with float32 activations: bfloat16 would lose about as much as the
    weights did, and save nothing, because the weights are nearly all that a step reads.
    """
    name = model.dtype if config.dtype == "auto" else config.dtype
    if config.dtype == "auto" and has_packed_weights(config, model, device.type):
        name = "float32"
    return None if name is None else getattr(torch, name)


def cache_dtype(config: ServerConfig, model: ModelConfig, weights: Weights) -> torch.dtype:
    """The dtype of the KV cache; logs a warning if the checkpoint's scales for it are ignored."""
    if config.kv_cache_dtype == "auto":
        packed = has_packed_weights(config, model, weights.device.type)
        smaller = packed and config.dtype == "auto" and config.kernels == "auto"
        return torch.bfloat16 if smaller else weights.dtype
    if weights.has_cache_scales:
        logger.warning(
            "ignoring the checkpoint's k_scale and v_scale: the FP8 cache uses a scale of 1"
        )
    return torch.float8_e4m3fn


def keeps_fp8(config: ServerConfig, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether FP8 weights are multiplied as FP8; otherwise they are dequantized on loading."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
        and dtype is not torch.float32
        and config.kernels == "auto"
        and find_spec("triton") is not None
    )


def _cuda_backends(
    config: ServerConfig, pool: KVPool, num_heads: int
) -> tuple[Kernels, AttentionBackend | FlashInferAttention]:
    """FlashInfer's, or torch's if FlashInfer lacks the dtype or head size, with one warning."""
    _set_programmatic_launch(config)
    _check_decode_kernel(config, pool, num_heads)
    kernels, no_kernels = _cuda_kernels(config, pool) if config.kernels == "auto" else (None, None)
    attention, no_attention = None, None
    if config.attention_backend != "torch_native":
        attention, no_attention = _cuda_attention(config, pool, num_heads)
    lacking = list(dict.fromkeys(reason for reason in (no_kernels, no_attention) if reason))
    if lacking:
        parts = ["attention"] * bool(no_attention) + ["operators"] * bool(no_kernels)
        logger.warning(
            "using torch's %s, which is slower: %s", " and ".join(parts), "; ".join(lacking)
        )
    return kernels or TorchKernels(), attention or TorchNativeAttention(pool)


def _set_programmatic_launch(config: ServerConfig) -> None:
    """For all models of the process; raises ConfigError if the GPU does not support it."""
    if find_spec("triton") is None:
        return
    from minisrv.engine.kernels.triton_dependency import set_programmatic_launch

    if config.programmatic_launch and torch.cuda.get_device_capability() < (9, 0):
        raise ConfigError("--programmatic-launch requires a GPU of compute capability 9.0")
    set_programmatic_launch(config.programmatic_launch)


def _check_decode_kernel(config: ServerConfig, pool: KVPool, num_heads: int) -> None:
    """Raise ConfigError if the kernel of --decode-kernel cannot be used."""
    name = config.decode_kernel
    if name == "auto":
        return
    reason = _lacking_for_flashinfer(pool)
    if config.attention_backend == "torch_native":
        reason = "--attention-backend is torch_native"
    if reason is None:
        capability = torch.cuda.get_device_capability(pool.device)
        reason = unsupported_decode_kernel(name, pool, num_heads, capability)
    if reason is not None:
        raise ConfigError(f"--decode-kernel {name} cannot be used: {reason}")


def _cuda_kernels(config: ServerConfig, pool: KVPool) -> tuple[Kernels | None, str | None]:
    """The operators, or the reason why they cannot be used."""
    if pool.dtype not in FLASHINFER_DTYPES:
        return None, _no_dtype(pool)
    if pool.stored_dtype is not pool.dtype and torch.cuda.get_device_capability() < (8, 9):
        return None, "the GPU does not support FP8"
    try:
        from minisrv.engine.kernels.cuda import CudaKernels

        return CudaKernels(joined=config.joined_kernels), None
    except ImportError as error:
        return None, str(error)


def _cuda_attention(
    config: ServerConfig, pool: KVPool, num_heads: int
) -> tuple[FlashInferAttention | None, str | None]:
    """The attention, or the reason why it cannot be used."""
    lacking = _lacking_for_flashinfer(pool)
    if lacking is not None:
        return None, lacking
    num_bytes = workspace_bytes(
        num_heads=num_heads,
        num_kv_heads=pool.num_kv_heads,
        head_dim=pool.head_dim,
        num_sms=torch.cuda.get_device_properties(pool.device).multi_processor_count,
        largest_graph=largest_graph(config),
        chunk_tokens=largest_chunk_graph(config),
    )
    return FlashInferAttention(pool, num_heads, num_bytes, config.decode_kernel), None


def _lacking_for_flashinfer(pool: KVPool) -> str | None:
    """Why FlashInfer's attention cannot be used, or None."""
    if pool.dtype not in FLASHINFER_DTYPES:
        return _no_dtype(pool)
    if pool.head_dim not in FLASHINFER_HEAD_DIMS:
        return f"FlashInfer does not support a head size of {pool.head_dim}"
    try:
        device_kernels()
        import_flashinfer()
    except ImportError as error:
        return str(error)
    return None


def _no_dtype(pool: KVPool) -> str:
    return f"FlashInfer does not support {str(pool.dtype).removeprefix('torch.')}"
