"""FlashInfer's own planners, compiled for the CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tests.gpu_dry_run.compiled import load_compiled

_FOLDER = Path(__file__).parent
_SOURCES = (_FOLDER / "planner.cu", _FOLDER / "cuda_runtime_stub.cpp")
_FLAGS = ("-std=c++17", "-O1", "-shared", "-cudart", "none", "-arch=sm_90", "-Xcompiler", "-fPIC")
_CCCL = ("libcudacxx/include", "cub", "thrust")
_ADDRESS = 2**20  # of a workspace that nobody reads; aligned

# Registers per thread of BatchDecodeWithPagedKVCacheKernel by group of heads, for caches of so many
# bytes per number and a head size: what `cuobjdump --dump-resource-usage` shows of the modules that
# nvcc 13.0 compiles for sm_90a.
DECODE_REGISTERS = {
    (2, 64): {1: 72, 2: 52, 3: 56, 4: 56, 6: 56, 8: 56},
    (2, 128): {1: 72, 2: 52, 3: 56, 4: 59, 6: 56, 8: 56},
    (2, 256): {1: 72, 2: 52, 3: 48, 4: 60, 6: 64, 8: 56},
    (1, 128): {1: 76, 2: 72, 3: 72, 4: 77, 6: 80, 8: 72},
}


class Unavailable(Exception):
    """Why the planner cannot be compiled here."""


class PlanError(RuntimeError):
    """What FlashInfer's planner throws, such as that a workspace is too small."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a plan. query_starts, page_starts: int32 [batch + 1]."""

    query_starts: np.ndarray
    page_starts: np.ndarray
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    in_graph: bool = False
    uniform_q_len: int = 0
    disable_split_kv: bool = False
    kv_dtype_bytes: int = 2


@dataclass(frozen=True)
class Planned:
    """info: the numbers of a PrefillPlanInfo or a DecodePlanInfo. float_bytes, int_bytes: taken of
    the workspaces.
    """

    info: list[int]
    float_bytes: int
    int_bytes: int


class Planner:
    """Raises Unavailable, with the reason, if there is no nvcc or no FlashInfer."""

    def __init__(self) -> None:
        self._library = _compiled()
        self._library.plan_error.restype = ctypes.c_char_p
        self._pinned = np.zeros(8 * 2**20, np.uint8)

    def plan(self, request: Request, float_bytes: int, pinned: np.ndarray | None = None) -> Planned:
        """A plan with `float_bytes` of float workspace, written to `pinned` (uint8).

        Raises PlanError.
        """
        target = self._pinned if pinned is None else pinned
        info, used = np.zeros(15, np.int64), np.zeros(2, np.uint64)
        starts = [np.ascontiguousarray(request.query_starts, np.int32)]
        starts.append(np.ascontiguousarray(request.page_starts, np.int32))
        failed = self._library.plan_prefill(
            ctypes.c_void_p(_ADDRESS),
            ctypes.c_size_t(float_bytes),
            ctypes.c_void_p(_ADDRESS),
            _pointer(target),
            ctypes.c_size_t(target.size),
            *map(_pointer, starts),
            ctypes.c_uint32(int(starts[0][-1])),
            ctypes.c_uint32(len(starts[0]) - 1),
            ctypes.c_uint32(request.num_heads),
            ctypes.c_uint32(request.num_kv_heads),
            ctypes.c_uint32(request.head_dim),
            ctypes.c_uint32(request.page_size),
            ctypes.c_bool(request.in_graph),
            ctypes.c_int32(-1),
            ctypes.c_int32(-1),
            ctypes.c_bool(request.disable_split_kv),
            ctypes.c_int64(0),
            ctypes.c_int64(request.uniform_q_len),
            ctypes.c_uint32(request.kv_dtype_bytes),
            _pointer(info),
            _pointer(used),
        )
        return self._planned(failed, info, used)

    def plan_decode(
        self,
        request: Request,
        float_bytes: int,
        pinned: np.ndarray | None = None,
        registers: int | None = None,
    ) -> Planned:
        """As `plan`, of decodes on CUDA cores, by a kernel with so many registers per thread."""
        target = self._pinned if pinned is None else pinned
        info, used = np.zeros(10, np.int64), np.zeros(2, np.uint64)
        page_starts = np.ascontiguousarray(request.page_starts, np.int32)
        if registers is None:
            group = request.num_heads // request.num_kv_heads
            registers = DECODE_REGISTERS[request.kv_dtype_bytes, request.head_dim][group]
        failed = self._library.plan_decode(
            ctypes.c_void_p(_ADDRESS),
            ctypes.c_size_t(float_bytes),
            ctypes.c_void_p(_ADDRESS),
            _pointer(target),
            ctypes.c_size_t(target.size),
            _pointer(page_starts),
            ctypes.c_uint32(len(page_starts) - 1),
            ctypes.c_uint32(request.num_heads),
            ctypes.c_uint32(request.num_kv_heads),
            ctypes.c_uint32(request.head_dim),
            ctypes.c_uint32(request.page_size),
            ctypes.c_bool(request.in_graph),
            ctypes.c_uint32(request.kv_dtype_bytes),
            ctypes.c_uint32(registers),
            _pointer(info),
            _pointer(used),
        )
        return self._planned(failed, info, used)

    def _planned(self, failed: int, info: np.ndarray, used: np.ndarray) -> Planned:
        if failed:
            raise PlanError(self._library.plan_error().decode())
        return Planned(info.tolist(), int(used[0]), int(used[1]))


@cache
def load_planner() -> Planner:
    """Compiled once per machine, which takes some 15 seconds. Raises Unavailable."""
    return Planner()


def make_request(query_lens: Sequence[int], kv_lens: Sequence[int], **shape: int) -> Request:
    """Sequences of these lengths; `shape` are the other fields of a Request."""
    pages = -(-np.asarray(kv_lens, np.int64) // shape["page_size"])
    starts = [
        np.concatenate([[0], np.cumsum(lens)]).astype(np.int32) for lens in (query_lens, pages)
    ]
    return Request(query_starts=starts[0], page_starts=starts[1], **shape)  # type: ignore[arg-type]


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _compiled() -> ctypes.CDLL:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise Unavailable("there is no nvcc to compile FlashInfer's planner")
    flashinfer = find_spec("flashinfer")
    if flashinfer is None or flashinfer.origin is None:
        raise Unavailable("flashinfer is not installed")
    data = Path(flashinfer.origin).parent / "data"
    if not (data / "include" / "flashinfer" / "attention" / "scheduler.cuh").exists():
        raise Unavailable("flashinfer is installed without its headers")
    folders = [data / "include", *(data / "cccl" / name for name in _CCCL)]
    command = [nvcc, *_FLAGS, *(f"-I{folder}" for folder in folders)]
    return load_compiled(command, _SOURCES, importlib.metadata.version("flashinfer-python"))
