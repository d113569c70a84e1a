"""The implementations of the kernels that run on this machine."""

from __future__ import annotations

import torch

from minisrv.engine.kernels import compiler
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kernels.cpu import load_cpu_kernels
from minisrv.engine.kernels.torch_native import TorchKernels


def implementations(dtype: torch.dtype) -> list[Kernels]:
    """Torch's, then the compiled ones if there is a C++ compiler."""
    if compiler.find_compiler() is None:
        return [TorchKernels()]
    compiled = load_cpu_kernels(dtype)
    assert compiled is not None
    return [TorchKernels(), compiled]
