"""Finds the CUDA toolkit and the driver's library for FlashInfer, which compiles its own kernels.

By itself FlashInfer takes the folder above the `nvcc` on PATH for the toolkit and links with
libcuda.so. Its kernels compile but do not link where that nvcc is a wrapper script, or where the
driver provides only libcuda.so.1. Its norms do not compile without headers of cuBLAS and cuRAND.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger("minisrv.engine")

_LIBRARY_FOLDERS = ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib")
_DRIVER_FOLDERS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/local/nvidia/lib64",
    "usr/lib/wsl/lib",
)
_DRIVER = "libcuda.so.1"
# Of cuBLAS and cuRAND, which a toolkit that came with only the compiler does not have.
_UNUSED_HEADERS = ("cublasLt.h", "cublas_v2.h", "curand_kernel.h")


@dataclass(frozen=True, slots=True)
class CudaPaths:
    """toolkit: a folder with bin/nvcc; libraries: its folder with libcudart.so; driver: the folder
    with libcuda.so.1. None is what was not found.
    """

    toolkit: Path | None
    libraries: Path | None
    driver: Path | None

    def missing(self) -> list[str]:
        """A sentence for each part that FlashInfer needs to compile and that was not found."""
        sentences = []
        if self.toolkit is None:
            sentences.append(
                "there is no CUDA toolkit with bin/nvcc and lib64/libcudart.so; set CUDA_HOME"
            )
        if self.driver is None:
            sentences.append(
                f"the driver's {_DRIVER} was not found; add its folder to LD_LIBRARY_PATH"
            )
        return sentences

    def variables(self, stubs: Path, given: Mapping[str, str]) -> dict[str, str]:
        """The environment variables that make FlashInfer use these paths.

        stubs: a folder for what the compiler needs and does not find. given: the present variables,
        whose flags are kept.
        """
        variables, compiler, linker = {}, [], []
        if self.toolkit is not None and self.libraries is not None:
            variables["CUDA_HOME"] = str(self.toolkit)
            if self.libraries != self.toolkit / "lib64":
                linker.append(f"-L{self.libraries}")
            headers = (self.toolkit / "include" / name for name in _UNUSED_HEADERS)
            if missing := [header.name for header in headers if not header.exists()]:
                compiler.append(f"-I{_empty_headers(missing, stubs)}")
        if self.driver is not None:
            linker.append(f"-L{_linkable(self.driver, stubs)}")
        for name, flags in (
            ("FLASHINFER_EXTRA_CUDAFLAGS", compiler),
            ("FLASHINFER_EXTRA_LDFLAGS", linker),
        ):
            if flags:
                kept = shlex.split(given.get(name, ""))
                variables[name] = shlex.join(dict.fromkeys([*kept, *flags]))
        return variables


def find_cuda(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> CudaPaths:
    """The toolkit and the driver of this machine. A CUDA_HOME that is set is the only candidate.

    root: the folder below which everything outside the environment's paths is looked for.
    """
    found = ((home, folder) for home in _toolkits(environment, root) if (folder := _cudart(home)))
    toolkit, libraries = next(found, (None, None))
    drivers = (f for f in _drivers(environment, root) if (f / _DRIVER).exists())
    return CudaPaths(toolkit, libraries, next(drivers, None))


@functools.cache
def set_cuda_paths() -> None:
    """Set FlashInfer's environment variables in this process, and so in its children, once.

    On a machine with a GPU, what is missing is logged as a warning.
    """
    paths = find_cuda()
    if torch.cuda.is_available():
        for sentence in paths.missing():
            logger.warning("FlashInfer can use only kernels that are compiled: %s", sentence)
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", Path.home()))
    os.environ |= paths.variables(base / ".cache" / "minisrv" / "cuda", os.environ)


def _empty_headers(names: Sequence[str], stubs: Path) -> Path:
    """A folder with headers that FlashInfer includes and takes nothing from."""
    stubs.mkdir(parents=True, exist_ok=True)
    for name in names:
        (stubs / name).touch()
    return stubs


def _linkable(driver: Path, stubs: Path) -> Path:
    """A folder with libcuda.so: the linker does not look for libcuda.so.1."""
    if (driver / "libcuda.so").exists():
        return driver
    stubs.mkdir(parents=True, exist_ok=True)
    link = stubs / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(driver / _DRIVER)
    return stubs


def _toolkits(environment: Mapping[str, str], root: Path) -> Iterator[Path]:
    """Folders that may be a toolkit, the best first."""
    chosen = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if chosen:
        yield Path(chosen)
        return
    if nvcc := shutil.which("nvcc", path=environment.get("PATH", "")):
        yield Path(nvcc).parent.parent
        yield Path(nvcc).resolve().parent.parent
    yield root / "usr/local/cuda"
    yield from sorted((root / "usr/local").glob("cuda-*"), reverse=True)


def _cudart(home: Path) -> Path | None:
    """The toolkit's folder with libcudart.so, or None if `home` is not a toolkit."""
    if not (home / "bin/nvcc").exists():
        return None
    folders = (home / name for name in _LIBRARY_FOLDERS)
    return next((folder for folder in folders if (folder / "libcudart.so").exists()), None)


def _drivers(environment: Mapping[str, str], root: Path) -> Iterator[Path]:
    """Folders that may hold libcuda.so.1: where this process loaded it from comes first."""
    maps = root / "proc/self/maps"
    for line in maps.read_text().splitlines() if maps.exists() else []:
        if "/libcuda.so" in line:
            yield Path(line[line.index("/") :]).parent
    yield from map(Path, filter(None, environment.get("LD_LIBRARY_PATH", "").split(":")))
    yield from (root / name for name in _DRIVER_FOLDERS)
