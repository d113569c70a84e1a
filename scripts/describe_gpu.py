"""Describe the machine as far as minisrv depends on it; exit status 1 without a GPU."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from contextlib import suppress

import torch

from minisrv.engine.cuda_paths import find_cuda


def main() -> int:
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    for command in (["nvidia-smi"], ["nvcc", "--version"], ["c++", "--version"]):
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, timeout=5)
    print(f"ninja: {shutil.which('ninja')}")
    available = torch.cuda.is_available()
    paths = find_cuda()
    print(f"CUDA toolkit: {paths.toolkit}, libraries {paths.libraries}, driver {paths.driver}")
    print("\n".join(paths.missing()))
    if not available:
        print("torch finds no GPU")
        return 1
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory, capability = gpu.total_memory / 2**30, f"{gpu.major}.{gpu.minor}"
        print(f"{gpu.name}, {memory:.2f} GiB, {gpu.multi_processor_count} SMs, {capability}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
