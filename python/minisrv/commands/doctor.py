"""`minisrv doctor`: what this machine has, and which kernels the engine will run on it.

The checks are the engine's own: it compiles what a server would compile, and chooses its kernels.
Neither environment variables nor the user's name are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minisrv.checkpoint.hub import DEMO_DIR
from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.memory import available_memory, cpu_cache_bytes, format_size
from minisrv.engine.threads import usable_cores
from minisrv.user_cache import user_cache

# Flags of /proc/cpuinfo that our kernels, oneDNN's or both have code for.
_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
_HEAD_DIM, _NUM_HEADS = 128, 16  # of most models
_MUCH_MEMORY, _MUCH_DISK = 2 * 2**30, 5 * 2**30
_NAMES = {
    "CpuKernels": "our operators in C++",
    "CpuAttention": "our attention in C++",
    "TorchKernels": "torch's operators",
    "TorchNativeAttention": "torch's attention",
    "CudaKernels": "FlashInfer's and Triton's operators",
    "FlashInferAttention": "FlashInfer's attention",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. remedy: what to do about it; empty if nothing has to be done."""

    name: str
    value: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; exit status 0: nothing has to be done, 1: there are remedies."""
    parser = argparse.ArgumentParser(
        prog="minisrv doctor",
        description="Show what this machine has, which kernels minisrv will run, and what to do.",
    )
    parser.add_argument("--json", action="store_true", help="one object, for reports of bugs")
    options = parser.parse_args(argv)
    findings = []
    for finding in map(_anonymous, examine()):
        findings.append(finding)
        if not options.json:
            print(describe(finding), flush=True)
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
    return int(any(finding.remedy for finding in findings))


def describe(finding: Finding) -> str:
    """A line, and below it the remedy."""
    line = f"{'!' if finding.remedy else ' '} {finding.name:<15}{finding.value}"
    return f"{line}\n{'':<17}-> {finding.remedy}" if finding.remedy else line


def examine() -> Iterator[Finding]:
    """All checks, the fast ones first."""
    yield Finding("minisrv", f"{version('minisrv')}, Python {platform.python_version()}")
    yield Finding("system", platform.platform())
    yield from (check_processor(), check_memory(), check_disk(), check_compiler())
    yield from (_guarded(name, check) for name, check in _TORCH_CHECKS.items())


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Model, cores and instruction sets."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    entries = dict(reversed([[p.strip() for p in x.split(":", 1)] for x in lines if ":" in x]))
    flags = (entries.get("flags") or entries.get("Features") or "").split()
    model = entries.get("model name") or platform.processor() or platform.machine()
    found = [name for name in _INSTRUCTIONS if name in flags]
    remedy = ""
    if platform.machine() == "x86_64" and flags and "avx2" not in found:
        remedy = "a processor or a virtual machine's processor type with AVX2 is many times faster"
    cores = f"{usable_cores()} of {os.cpu_count()} cores"
    return Finding("processor", f"{model}, {cores}: {', '.join(found) or 'no known sets'}", remedy)


def check_memory() -> Finding:
    """What is available, and the KV cache that a server takes of it by default on a CPU."""
    available = available_memory()
    cache, _ = cpu_cache_bytes(ServerConfig(model="demo"))
    value = f"{format_size(available)} available; default KV cache on a CPU {format_size(cache)}"
    if available < _MUCH_MEMORY:
        return Finding("memory", value, "end other programs, or serve a small or quantized model")
    return Finding("memory", value)


def check_disk() -> Finding:
    """The folder for compiled kernels and downloads."""
    folder = user_cache()
    if folder is None:
        return Finding(
            "cache folder",
            "not writable, so kernels are compiled at each start",
            "make ~/.cache writable or set XDG_CACHE_HOME to a folder that is",
        )
    shown = "$XDG_CACHE_HOME/minisrv" if os.environ.get("XDG_CACHE_HOME") else folder
    free = shutil.disk_usage(folder).free
    remedy = "free some space: most models are larger" if free < _MUCH_DISK else ""
    return Finding("cache folder", f"{shown}, {format_size(free)} free", remedy)


def check_compiler() -> Finding:
    """The compiler that the engine takes."""
    from minisrv.engine.kernels.compiler import find_compiler

    compiler = find_compiler()
    if compiler is None:
        return Finding(
            "C++ compiler",
            "none, so small operators and attention are torch's, which is slower on a CPU",
            "install g++ or clang++ (Debian: apt-get install g++), or set CXX",
        )
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    first = (shown.stdout.splitlines() or ["unknown version"])[0]
    return Finding("C++ compiler", first)


def check_torch() -> Finding:
    """The version, and what it was built for."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding("torch", f"{torch.__version__}, built for {built}")


def check_gpu() -> Finding:
    """The GPUs that torch can use, with the driver; or why it can use none."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        shown = [f"{p.name} ({p.major}.{p.minor}, {format_size(p.total_memory)})" for p in gpus]
        return Finding("GPU", f"{', '.join(shown)}; driver {driver or 'unknown'}")
    if driver is None:
        return Finding("GPU", "none: there is no NVIDIA driver")
    if torch.version.cuda is None:
        return Finding(
            "GPU",
            f"driver {driver}, but this torch was built without CUDA",
            "install a torch with CUDA: https://pytorch.org/get-started/locally",
        )
    return Finding(
        "GPU",
        f"driver {driver}, but torch, built for CUDA {torch.version.cuda}, cannot use a GPU",
        "see what nvidia-smi reports; update the driver if it is older than this CUDA",
    )


def check_flashinfer() -> Finding:
    """FlashInfer and Triton, and what FlashInfer needs to compile its kernels."""
    import torch

    from minisrv.engine.cuda_paths import find_cuda

    versions = {name: _version(name) for name in ("flashinfer-python", "triton")}
    value = ", ".join(f"{name} {found or 'not installed'}" for name, found in versions.items())
    if not torch.cuda.is_available():
        return Finding("GPU kernels", f"{value}; not used without a GPU")
    if None in versions.values():
        return Finding("GPU kernels", value, "pip install 'minisrv[gpu]'")
    return Finding("GPU kernels", value, "; ".join(find_cuda().missing()))


def check_cpu_kernels() -> Finding:
    """Compiles them where that has not been done, as the first start of a server does."""
    from minisrv.engine.kernels.cpu import load_cpu_library
    from minisrv.engine.kernels.packed import load_packed_library

    return _check_libraries({"bfloat16": load_cpu_library, "4 and 8 bits": load_packed_library})


def _check_libraries(loaders: dict[str, Callable[[], object]]) -> Finding:
    import ctypes

    from minisrv.engine.kernels.compiler import find_compiler, instructions

    with _Warnings() as warnings:
        libraries = {name: load() for name, load in loaders.items()}
    shown = [
        f"{name} with {instructions(library)}"
        for name, library in libraries.items()
        if isinstance(library, ctypes.CDLL)
    ]
    value = f"products: {', '.join(shown)}" if shown else "not compiled"
    if not warnings.texts or find_compiler() is None:  # of which there is a finding already
        return Finding("CPU kernels", value)
    return Finding("CPU kernels", value, f"update the compiler: {'; '.join(warnings.texts)}")


def check_choice() -> Finding:
    """What the engine chooses for a model in bfloat16 with the usual head size."""
    import torch

    from minisrv.engine.backends import choose_backends
    from minisrv.engine.kv_pool import KVPool
    from minisrv.engine.rank_engine import choose_device

    config = ServerConfig(model="demo")
    model = replace(load_model_config(DEMO_DIR, None), head_dim=_HEAD_DIM, num_layers=1)
    device = choose_device(config, 0)
    with _Warnings() as warnings:
        pool = KVPool(model, _NUM_HEADS, config.page_size, torch.bfloat16, device)
        chosen = [type(part).__name__ for part in choose_backends(config, pool, _NUM_HEADS)]
    names = " and ".join(_NAMES.get(name, name) for name in chosen)
    value = "; ".join([f"{names}, on {device.type}, for models in bfloat16", *warnings.texts])
    return Finding("serves with", value)


_TORCH_CHECKS = {
    "torch": check_torch,
    "GPU": check_gpu,
    "GPU kernels": check_flashinfer,
    "CPU kernels": check_cpu_kernels,
    "serves with": check_choice,
}


class _Warnings(logging.Handler):
    """Collects the engine's warnings in place of printing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        self._logger = logging.getLogger("minisrv.engine")
        self._propagated, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check whose failure is a finding: the others still run."""
    try:
        return check()
    except Exception as error:
        return Finding(name, f"cannot be checked: {error!r}", "report this with the lines above")


def _driver(
    module: Path = Path("/proc/driver/nvidia/version"), root: Path = Path("/sys/module/nvidia")
) -> str | None:
    """The version of NVIDIA's kernel module; None where none is loaded."""
    if (root / "version").exists():
        return (root / "version").read_text().strip()
    return module.read_text().splitlines()[0] if module.exists() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _anonymous(finding: Finding) -> Finding:
    """Paths below the home folder begin with ~; in other paths USER replaces the user's name."""
    texts = [finding.value, finding.remedy]
    if home := os.path.expanduser("~").rstrip("/"):
        texts = [re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) for text in texts]
    with contextlib.suppress(KeyError):  # a container may run a user without an account
        user = re.escape(pwd.getpwuid(os.getuid()).pw_name)
        texts = [re.sub(rf"(?<=/){user}(?![\w.-])", "USER", text) for text in texts]
    return Finding(finding.name, *texts)


if __name__ == "__main__":
    sys.exit(main())
