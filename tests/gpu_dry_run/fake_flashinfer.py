"""FlashInfer with its real Python and its real planner; only the compiled kernels are missing.

In their place stand functions that hold each call to what the C++ behind it reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu_dry_run.fake_attention import (
    DecodeModule,
    Plans,
    PrefillModule,
    Types,
    require,
    require_vectors,
)
from tests.gpu_dry_run.fake_cuda import FakeGPU
from tests.gpu_dry_run.fake_xqa import XqaModule, XqaTypes
from tests.gpu_dry_run.planner import Planner

_HALF_TYPES = (torch.bfloat16, torch.float16)


class _Operators:
    """The functions of the modules for norms and the activation."""

    def __init__(self, gpu: FakeGPU) -> None:
        self._gpu = gpu

    def rmsnorm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float, pdl: bool) -> None:
        self._require_rows("rmsnorm", x, out)
        self._require_weight("rmsnorm", x, weight)
        self._gpu.launch("flashinfer::rmsnorm")

    def fused_add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, pdl: bool
    ) -> None:
        self._require_rows("fused_add_rmsnorm", x, residual)
        self._require_weight("fused_add_rmsnorm", x, weight)
        self._gpu.launch("flashinfer::fused_add_rmsnorm")

    def silu_and_mul(self, out: Tensor, x: Tensor, pdl: bool) -> None:
        for tensor in (out, x):
            self._require_half("silu_and_mul", tensor)
            require(tensor.is_contiguous(), "silu_and_mul of a tensor with gaps")
        require(x.dtype is out.dtype, "silu_and_mul of other dtypes")
        require(x.numel() == 2 * out.numel(), "silu_and_mul of other shapes")
        self._gpu.launch("flashinfer::silu_and_mul")

    def _require_rows(self, name: str, x: Tensor, other: Tensor) -> None:
        for tensor in (x, other):
            self._require_half(name, tensor)
            require(tensor.dim() == 2 and tensor.stride(1) == 1, f"{name} of rows with gaps")
        require(x.dtype is other.dtype and x.shape == other.shape, f"{name} of other shapes")

    def _require_weight(self, name: str, x: Tensor, weight: Tensor) -> None:
        self._require_half(name, weight)
        require(weight.dtype is x.dtype, f"{name} with a weight of another dtype")
        require(tuple(weight.shape) == tuple(x.shape[1:]), f"{name} with a weight of another size")
        require(weight.is_contiguous(), f"{name} with a weight with gaps")

    def _require_half(self, name: str, tensor: Tensor) -> None:
        self._gpu.require_on_device(tensor, f"an operand of {name}")
        require(tensor.dtype in _HALF_TYPES, f"{name} of {tensor.dtype}")
        require_vectors(tensor)


@contextmanager
def fake_flashinfer(gpu: FakeGPU, planner: Planner) -> Iterator[Plans]:
    """Within the context, FlashInfer's modules are these; yields what was planned."""
    import flashinfer.activation
    import flashinfer.decode
    import flashinfer.norm
    import flashinfer.prefill

    xqa = importlib.import_module("flashinfer.xqa")  # the attribute is a function
    plans, operators = Plans(), _Operators(gpu)

    def prefill_module(backend: str, *types: Any) -> Any:
        require(backend == "fa2", f"attention by {backend}")
        return attention_module(PrefillModule, types)

    def decode_module(*types: Any) -> Any:
        return attention_module(DecodeModule, types)

    def xqa_module(*types: Any) -> Any:
        module = XqaModule(gpu, XqaTypes(*types))
        return SimpleNamespace(name="xqa", build_and_load=lambda: module)

    def attention_module(kind: type[PrefillModule | DecodeModule], types: Any) -> Any:
        query, cache, out, index, head_dim, head_dim_vo, *variant = types
        require(head_dim == head_dim_vo, "a head size of its own for values")
        # No position encoding, no sliding window, no soft cap, no 16-bit reduction.
        require(not any(variant), f"attention of the variant {variant}")
        module = kind(gpu, planner, plans, Types(query, cache, out, index, head_dim))
        return SimpleNamespace(build_and_load=lambda: module)

    def operator_module(*names: str) -> Any:
        return SimpleNamespace(build_and_load=lambda: operators)

    caches = (
        flashinfer.prefill.get_batch_prefill_module,
        flashinfer.decode.get_batch_decode_module,
        xqa._get_xqa_module_cached,
        flashinfer.norm.get_norm_module,
        flashinfer.activation.get_act_and_mul_module,
    )
    generators = (
        (flashinfer.prefill, "gen_batch_prefill_module", prefill_module),
        (flashinfer.decode, "gen_batch_decode_module", decode_module),
        (xqa, "gen_xqa_module", xqa_module),
        (flashinfer.norm, "gen_norm_module", operator_module),
        (flashinfer.norm, "_USE_CUDA_NORM", True),
        (flashinfer.activation, "gen_act_and_mul_module", operator_module),
    )
    with ExitStack() as patches:
        for module, name, value in generators:
            patches.enter_context(mock.patch.object(module, name, value))
        for cached in caches:
            cached.cache_clear()
            patches.callback(cached.cache_clear)
        yield plans
