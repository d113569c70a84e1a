"""The tensors of a checkpoint, taken by name while the model is built.

Layers ask for what they need (`take`), one tensor is read at a time, and `finish` checks names both
ways: nothing asked for may be missing, nothing in the files may be left over.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from minisrv.checkpoint.model_config import Fp8Config
from minisrv.checkpoint.own_head import EMBEDDING_NAME, HEAD_NAME
from minisrv.engine.fp8 import DTYPES as FP8_DTYPES
from minisrv.engine.fp8 import SCALE_SUFFIXES, Fp8Matrix, read_matrix
from minisrv.engine.packed import PackedMatrix, can_round, round_int4, round_int8
from minisrv.engine.parallel.shard import Shard
from minisrv.engine.quantization import Quantization
from minisrv.errors import ConfigError
from minisrv.start_progress import ReportProgress, no_progress

logger = logging.getLogger("minisrv.engine")

LOADING = "load weights"  # the phase of a start
_NAMES_SHOWN = 5
_INDEX = "model.safetensors.index.json"
_NOT_PARAMETERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")
_CACHE_SCALES = re.compile(r"\.[kv]_scale$")
_ACTIVATION_SCALES = re.compile(r"\.(input|activation|k|v|q)_scale$")
_ROUTER = re.compile(r"\.mlp\.gate\.weight$")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Weights(Protocol):
    """The source of a model's parameters while it is being built."""

    dtype: torch.dtype
    device: torch.device
    num_bytes: int  # loaded so far
    has_cache_scales: bool  # the checkpoint has scales for an FP8 KV cache
    keeps_fp8: bool  # FP8 matrices are not dequantized
    packs: bool  # matrices may be packed, the embedding and the head, too

    def load_tensor(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor:
        """The tensor `name` of (full) `shape`, or one shard of it, in `dtype` on `device`."""

    def load_matrix(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor | Fp8Matrix | PackedMatrix:
        """As `load_tensor`, but an FP8 matrix stays FP8 if `keeps_fp8`, and may be packed."""

    def has_own(self, name: str, tied_to: str) -> bool:
        """Whether `name`, tied to another tensor by config.json, has values of its own."""

    def finish(self) -> None:
        """Called when the model is built."""


class CheckpointWeights:
    """The safetensors files of a directory: a single one, or several with an index.

    FP8 weights are multiplied by their scales, or with `keep_fp8` returned together with them.
    Scales of activations are skipped, because they are computed in each step where they are needed.
    With `quantization` matrices are rounded one by one while they are read.
    Raises ConfigError for missing or broken files, wrong shapes, and missing or unexpected names.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        fp8: Fp8Config | None = None,
        keep_fp8: bool = False,
        quantization: Quantization = "none",
        progress: ReportProgress = no_progress,
    ) -> None:
        self.device, self.num_bytes = device, 0
        self._fp8, self.keeps_fp8 = fp8, keep_fp8
        self._quantization, self.packs = quantization, quantization != "none"
        self._file_of = _files_by_tensor(directory)
        self.has_cache_scales = any(_CACHE_SCALES.search(name) for name in self._file_of)
        self.dtype = dtype or self._stored_dtype()
        self._left = {name for name in self._file_of if not _NOT_PARAMETERS.search(name)}
        if fp8 is not None:
            self._left = {name for name in self._left if not _ACTIVATION_SCALES.search(name)}
        self._file_bytes, self._read_bytes = _size_of_files(directory), 0
        self._missing: list[str] = []
        self._unrounded: list[str] = []
        self._progress = progress

    def load_tensor(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor:
        """Reads only the shard from the file. A missing tensor is reported by `finish`."""
        tensor = self._read(name, shape, shard)
        if isinstance(tensor, Fp8Matrix):
            tensor = tensor.dequantized()
        self.num_bytes += tensor.numel() * self.dtype.itemsize
        return tensor.to(device=self.device, dtype=self.dtype, copy=True)

    def load_matrix(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor | Fp8Matrix | PackedMatrix:
        if not (self.keeps_fp8 or self.packs):
            return self.load_tensor(name, shape, shard)
        matrix = rounded(name, self._read(name, shape, shard), self._quantization)
        if isinstance(matrix, torch.Tensor):
            if self.packs and not _ROUTER.search(name):
                self._unrounded.append(name)
            self.num_bytes += matrix.numel() * self.dtype.itemsize
            return matrix.to(device=self.device, dtype=self.dtype, copy=True)
        self.num_bytes += matrix.num_bytes
        return matrix if isinstance(matrix, PackedMatrix) else matrix.to(self.device)

    def has_own(self, name: str, tied_to: str) -> bool:
        """As transformers: a tied tensor in the files counts unless it equals the other one."""
        if name not in self._file_of:
            return False
        if tied_to in self._file_of:
            pair = (self._file_of[key].get_tensor(key).to(self.dtype) for key in (name, tied_to))
            if torch.equal(*pair):
                self._left.discard(name)
                return False
        return True

    def _read(
        self, name: str, shape: Sequence[int], shard: Shard | None
    ) -> torch.Tensor | Fp8Matrix:
        file = self._file_of.get(name)
        if file is None:
            self._missing.append(name)
            return _copy_shard(torch.zeros(tuple(shape), dtype=self.dtype), shard)
        stored = tuple(file.get_slice(name).get_shape())
        if stored != tuple(shape):
            raise ConfigError(
                f"the checkpoint's {name} has shape {list(stored)}, but config.json implies "
                f"{list(shape)}"
            )
        tensor: torch.Tensor = (
            file.get_tensor(name) if shard is None else file.get_slice(name)[_index(shard)]
        )
        if not tensor.is_floating_point():
            raise ConfigError(
                f"the checkpoint's {name} has dtype {tensor.dtype}, which is not supported"
            )
        self._left.discard(name)
        self._read_bytes += math.prod(stored) * tensor.dtype.itemsize
        fraction = min(1.0, self._read_bytes / self._file_bytes)
        self._progress(LOADING, fraction, self._file_bytes, "B")
        if tensor.dtype in FP8_DTYPES:
            return self._fp8_matrix(name, tensor, stored, shard)
        return tensor

    def finish(self) -> None:
        """Raise ConfigError unless the model found all its tensors and loaded all in the files."""
        problems = [
            f"{what} {_listing(names)}"
            for what, names in (("lacks", self._missing), ("has unexpected", sorted(self._left)))
            if names
        ]
        if problems:
            raise ConfigError(f"the checkpoint {' and '.join(problems)}")
        if self._unrounded:
            logger.warning(
                "the rows of %s are not a multiple of 32 long and are not rounded",
                _listing(self._unrounded),
            )
        self._file_of.clear()
        self._progress(LOADING, 1.0, self._file_bytes, "B")

    def _fp8_matrix(
        self, name: str, weight: torch.Tensor, shape: tuple[int, ...], shard: Shard | None
    ) -> torch.Tensor | Fp8Matrix:
        if self._fp8 is None:
            raise ConfigError(
                f"the checkpoint's {name} has dtype {weight.dtype}, but config.json has no "
                "quantization_config for it"
            )
        found = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in self._file_of]
        if not found:
            self._missing.append(name + SCALE_SUFFIXES[-1])
            return weight.float()
        self._left.discard(found[0])
        scale = self._file_of[found[0]].get_tensor(found[0])
        return read_matrix(name, weight, scale, shape, shard, self._fp8)

    def _stored_dtype(self) -> torch.dtype:
        """The dtype of the first tensor that has one of `_DTYPES`."""
        kinds = [file.get_slice(name).get_dtype() for name, file in self._file_of.items()]
        known = [_DTYPES[kind] for kind in kinds if kind in _DTYPES]
        if not known:
            raise ConfigError(
                f"config.json has no dtype and the checkpoint has {kinds[0]}; set --dtype"
            )
        return known[0]


class DummyWeights:
    """Random weights of any shape from a fixed seed, for benchmarks."""

    def __init__(
        self,
        *,
        dtype: torch.dtype | None,
        device: torch.device,
        quantization: Quantization = "none",
    ) -> None:
        self.dtype, self.device, self.num_bytes = dtype or torch.bfloat16, device, 0
        self.has_cache_scales = self.keeps_fp8 = False
        self._quantization, self.packs = quantization, quantization != "none"
        self._generator = torch.Generator(device).manual_seed(0)

    def load_tensor(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor:
        """Ones for norms; for the others a normal distribution with standard deviation 0.02."""
        tensor = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0, 0.02, generator=self._generator)
        part = _copy_shard(tensor, shard)
        self.num_bytes += part.numel() * self.dtype.itemsize
        return part

    def load_matrix(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor | Fp8Matrix | PackedMatrix:
        tensor = self.load_tensor(name, shape, shard)
        matrix = rounded(name, tensor, self._quantization)
        if isinstance(matrix, PackedMatrix):
            self.num_bytes += matrix.num_bytes - tensor.nbytes
        return matrix

    def has_own(self, name: str, tied_to: str) -> bool:
        return False

    def finish(self) -> None:
        """Nothing to check."""


def rounded(
    name: str, matrix: torch.Tensor | Fp8Matrix, quantization: Quantization
) -> torch.Tensor | Fp8Matrix | PackedMatrix:
    """Rounded; unless its rows are not whole groups, or it is a router, which picks the experts."""
    if quantization == "none" or isinstance(matrix, Fp8Matrix):
        return matrix
    if _ROUTER.search(name) or not can_round(matrix):
        return matrix
    is_end = name in (EMBEDDING_NAME, HEAD_NAME)
    return round_int8(matrix) if quantization == "int8" or is_end else round_int4(matrix)


def _index(shard: Shard) -> tuple[slice, ...]:
    return (*[slice(None)] * shard.dim, slice(shard.start, shard.start + shard.length))


def _copy_shard(tensor: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    """A copy of the shard, so that the full tensor can be freed."""
    return tensor if shard is None else tensor[_index(shard)].clone()


def _files_by_tensor(directory: Path) -> dict[str, Any]:
    """The file of each tensor; of several files the last one, as in transformers."""
    file_of: dict[str, Any] = {}
    repeated: set[str] = set()
    for file in _open_files(directory):
        names = set(file.keys())
        repeated |= names & file_of.keys()
        file_of |= dict.fromkeys(names, file)
    if repeated:
        logger.warning(
            "several safetensors files in %s have %s; those in the last file are used",
            directory,
            _listing(sorted(repeated)),
        )
    return file_of


def _open_files(directory: Path) -> list[Any]:
    files = []
    for name in _file_names(directory):
        path = directory / name
        if not path.is_file():
            raise ConfigError(_no_weights(directory, path))
        try:
            files.append(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a valid safetensors file: {error}") from None
    return files


def _size_of_files(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in _file_names(directory))


def _file_names(directory: Path) -> list[str]:
    index = directory / _INDEX
    if not index.is_file():
        return ["model.safetensors"]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is not a valid safetensors index: {error!r}") from None
    for name in names or [None]:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(
                f"{index} is not a valid safetensors index: it lists {name!r}, which is not the "
                "name of a file in the same directory"
            )
    return sorted(names)


def _no_weights(directory: Path, path: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        return f"{directory} has weights only as .bin or .pt files; minisrv needs safetensors files"
    return f"{path} does not exist; minisrv needs weights in safetensors files"


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
