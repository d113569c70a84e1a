"""Which implementations of operators and attention suit the device, the type and the options."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from minisrv.config import ServerConfig
from minisrv.engine.attention.base import AttentionBackend
from minisrv.engine.attention.cpu import CpuAttention
from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kernels.cpu import ATTENTION_HEAD_DIMS, load_cpu_kernels
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.weights import Weights
from minisrv.errors import ConfigError

logger = logging.getLogger("minisrv.engine")


def choose_backends(
    config: ServerConfig, pool: KVPool, num_heads: int
) -> tuple[Kernels, AttentionBackend]:
    """The fastest that can be used, with a warning where one is missing.

    num_heads: query heads of this rank. Raises ConfigError for FlashInfer on a CPU.
    """
    if pool.device.type == "cuda":
        return _cuda_kernels(config, pool), _cuda_attention(config, pool, num_heads)
    if config.attention_backend == "flashinfer":
        raise ConfigError("--attention-backend flashinfer needs a GPU; the device here is a CPU")
    if pool.stored_dtype is not pool.dtype:
        logger.warning("with an FP8 cache on a CPU torch's operators are used, which are slower")
        return TorchKernels(), TorchNativeAttention(pool)
    compiled = load_cpu_kernels(pool.dtype) if config.kernels == "auto" else None
    kernels: Kernels = compiled or TorchKernels()
    if compiled and config.attention_backend == "auto" and pool.head_dim in ATTENTION_HEAD_DIMS:
        return kernels, CpuAttention(pool, compiled)
    return kernels, TorchNativeAttention(pool)


def cache_dtype(config: ServerConfig, weights: Weights) -> torch.dtype:
    """The type of keys and values in the cache, with a warning where their scales are not used."""
    if config.kv_cache_dtype == "auto":
        return weights.dtype
    if weights.has_cache_scales:
        logger.warning("the checkpoint's k_scale and v_scale are not used: the FP8 cache has 1")
    return torch.float8_e4m3fn


def keeps_fp8(config: ServerConfig, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether FP8 weights are multiplied as they are; else they are dequantized."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
        and dtype is not torch.float32
        and config.kernels == "auto"
        and find_spec("triton") is not None
    )


def _cuda_kernels(config: ServerConfig, pool: KVPool) -> Kernels:
    if pool.stored_dtype is not pool.dtype and torch.cuda.get_device_capability() < (8, 9):
        logger.warning("torch's operators are used, which are slower: the GPU has no FP8")
        return TorchKernels()
    if config.kernels == "auto":
        try:
            from minisrv.engine.kernels.cuda import CudaKernels

            return CudaKernels()
        except ImportError as error:
            logger.warning("torch's operators are used, which are slower: %s", error)
    return TorchKernels()


def _cuda_attention(config: ServerConfig, pool: KVPool, num_heads: int) -> AttentionBackend:
    if config.attention_backend != "torch_native":
        try:
            from minisrv.engine.attention import flashinfer

            if pool.dtype in flashinfer.DTYPES and pool.head_dim in flashinfer.HEAD_DIMS:
                return flashinfer.FlashInferAttention(pool, num_heads)
            lacking = f"FlashInfer has no heads of {pool.head_dim} {_name(pool.dtype)} numbers"
        except ImportError as error:
            lacking = str(error)
        logger.warning("torch's attention is used, which is slower: %s", lacking)
    return TorchNativeAttention(pool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
