"""The tensors of GGUF files, taken by name while the model is built.

The files are memory-mapped: a tensor is converted straight from the map, which then gives its
memory back. So there is no second copy of a file at any time.
"""

# Shapes: O outputs and I inputs of a matrix.

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from minisrv.checkpoint.gguf.config import PACKED_KINDS, ROPE_FACTORS
from minisrv.checkpoint.gguf.names import gguf_name, turns_neighbours
from minisrv.checkpoint.gguf.reading import open_gguf
from minisrv.checkpoint.model_config import ModelConfig
from minisrv.engine.fp8 import Fp8Matrix
from minisrv.engine.gguf_packed import from_gguf
from minisrv.engine.memory import format_size
from minisrv.engine.packed import PackedMatrix
from minisrv.engine.packed import shard as shard_matrix
from minisrv.engine.parallel.shard import Shard
from minisrv.engine.quantization import Quantization
from minisrv.engine.weights import LOADING, rounded
from minisrv.errors import ConfigError
from minisrv.start_progress import ReportProgress, no_progress

logger = logging.getLogger("minisrv.engine")

_NAMES_SHOWN = 5
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 22  # weights that are converted together


class GgufWeights:
    """The weights of GGUF files, for a model that `load_gguf_config` has read from them.

    On a CPU quantized matrices stay packed, without a change to any number; on a GPU they are
    dequantized. With `quantization` the other matrices are rounded. Raises ConfigError for wrong
    shapes, and missing or unexpected names.
    """

    has_cache_scales = keeps_fp8 = False

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = "none",
        progress: ReportProgress = no_progress,
    ) -> None:
        self.dtype, self.device, self.num_bytes = dtype, device, 0
        self.packs, self._quantization = device.type == "cpu", quantization
        self._checkpoint, self._config, self._progress = open_gguf(path), config, progress
        architecture = self._checkpoint.get("general.architecture", str)
        assert architecture is not None
        self._architecture = architecture
        self._left = dict.fromkeys(self._checkpoint.tensors)
        self._left.pop(ROPE_FACTORS, None)
        sizes = [self._checkpoint.tensors[name].num_bytes for name in self._left]
        self._file_bytes = self._left_bytes = sum(sizes)
        self._packed_bytes = self._stored_bytes = 0
        if config.packed is not None and not self.packs:
            logger.warning(
                "%s is dequantized to %s; quantized matrices stay packed only on a CPU",
                self._checkpoint.name,
                str(dtype).removeprefix("torch."),
            )

    def load_tensor(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor:
        """Reads only the rows of the shard."""
        kind, raw = self._read(name, shape, shard)
        width = shape[-1] if len(shape) > 1 else 1
        columns = slice(0, width)
        if shard is not None and shard.dim == 1:
            columns = slice(shard.start, shard.start + shard.length)
        rows = torch.empty(raw.shape[0], columns.stop - columns.start, dtype=self.dtype)
        step = max(1, _BLOCK // width)
        for start in range(0, raw.shape[0], step):
            block = _numbers(raw[start : start + step], kind)
            rows[start : start + step] = block[:, columns]
        self._done(name)
        self.num_bytes += rows.nbytes
        return (rows if len(shape) > 1 else rows.flatten()).to(self.device)

    def load_matrix(
        self, name: str, shape: Sequence[int], shard: Shard | None = None
    ) -> torch.Tensor | PackedMatrix:
        tensor = self._checkpoint.tensors.get(gguf_name(name)[0])
        if tensor is None or tensor.kind.name not in PACKED_KINDS or not self.packs:
            plain = self.load_tensor(name, shape, shard)
            matrix = rounded(name, plain, self._quantization)
            assert not isinstance(matrix, Fp8Matrix)
            if isinstance(matrix, PackedMatrix):
                self.num_bytes += matrix.num_bytes - plain.nbytes
            return matrix
        kind, raw = self._read(name, shape, shard)
        packed = from_gguf(kind, raw, (raw.shape[0], shape[1]))
        if shard is not None and shard.dim == 1:
            packed = shard_matrix(packed, shard)
        self._done(name)
        self._stored_bytes += raw.nbytes * packed.shape[1] // shape[1]
        self._packed_bytes += packed.num_bytes
        self.num_bytes += packed.num_bytes
        return packed

    def has_own(self, name: str, tied_to: str) -> bool:
        return self._has(name)

    def finish(self) -> None:
        """Raise ConfigError if the files have tensors that the model did not take."""
        if self._left:
            more = len(self._left) - _NAMES_SHOWN
            names = ", ".join([*self._left][:_NAMES_SHOWN]) + f" and {more} more" * (more > 0)
            raise ConfigError(f"{self._checkpoint.name} has unexpected {names}")
        if self._packed_bytes:
            logger.info(
                "quantized matrices take %s in memory, %s in the file",
                format_size(self._packed_bytes),
                format_size(self._stored_bytes),
            )

    def _has(self, name: str) -> bool:
        return gguf_name(name)[0] in self._checkpoint.tensors

    def _read(
        self, name: str, shape: Sequence[int], shard: Shard | None
    ) -> tuple[GGMLQuantizationType, NDArray[np.uint8]]:
        """The type, and the bytes of the rows of the shard, uint8 [O, bytes per row]."""
        in_file, expert = gguf_name(name)
        tensor = self._checkpoint.tensors.get(in_file)
        if tensor is None:
            raise ConfigError(f"{self._checkpoint.name} lacks {in_file}")
        moe = self._config.moe
        wanted = tuple(shape) if expert is None or moe is None else (moe.num_experts, *shape)
        if tensor.shape != wanted:
            raise ConfigError(
                f"{in_file} of {self._checkpoint.name} has shape {list(tensor.shape)}, but its "
                f"metadata implies {list(wanted)}"
            )
        if len(shape) == 1 and tensor.kind.name in PACKED_KINDS:
            raise ConfigError(f"{in_file} of {self._checkpoint.name} is quantized, but no matrix")
        first = shape[0] * (expert or 0)
        raw = self._checkpoint.data(in_file).reshape(-1, self._row_bytes(in_file, wanted))
        raw = raw[first : first + shape[0]]
        if shard is not None and shard.dim == 0:
            raw = raw[shard.start : shard.start + shard.length]
        if turns_neighbours(self._architecture, in_file):
            raw = _in_halves(raw, self._config.head_dim)
        return tensor.kind, raw

    def _row_bytes(self, in_file: str, shape: Sequence[int]) -> int:
        """Bytes of a row; of a vector, of a number."""
        num_rows = shape[0] if len(shape) == 1 else int(np.prod(shape[:-1]))
        return self._checkpoint.tensors[in_file].num_bytes // num_rows

    def _done(self, name: str) -> None:
        in_file, _ = gguf_name(name)
        self._checkpoint.forget(in_file)
        if in_file in self._left:
            del self._left[in_file]
            self._left_bytes -= self._checkpoint.tensors[in_file].num_bytes
        self._progress(LOADING, 1 - self._left_bytes / self._file_bytes, self._file_bytes, "B")


def _numbers(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> torch.Tensor:
    """A copy of these rows, in their own dtype or else in float32."""
    if (dtype := _DTYPES.get(kind.name)) is not None:
        return torch.from_numpy(raw.copy()).view(dtype)
    return torch.from_numpy(dequantize(raw, kind))


def _in_halves(raw: NDArray[np.uint8], head_dim: int) -> NDArray[np.uint8]:
    """Rows in the order of neighbours, in ours: the first of each pair, then the second."""
    heads = raw.reshape(-1, head_dim // 2, 2, raw.shape[1])
    return heads.swapaxes(1, 2).reshape(raw.shape)
