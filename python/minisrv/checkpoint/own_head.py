"""Whether a checkpoint has a head of its own, read from its files without loading them."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"


def has_own_head(directory: Path) -> bool:
    """Whether the safetensors files have a head that differs from the embedding table.

    False if there are no files, or none that can be read.
    """
    found: dict[str, tuple[str, Path, int, int]] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            found |= _find(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
    if HEAD_NAME not in found:
        return False
    return EMBEDDING_NAME not in found or not _equal(found[HEAD_NAME], found[EMBEDDING_NAME])


def _find(path: Path) -> dict[str, tuple[str, Path, int, int]]:
    """Type, file, first byte and end of both tensors, as far as the file has them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("not a safetensors file")
        header = json.loads(file.read(size))
    found = {}
    for name in (HEAD_NAME, EMBEDDING_NAME):
        if name in header:
            start, end = header[name]["data_offsets"]
            found[name] = (header[name]["dtype"], path, 8 + size + start, 8 + size + end)
    return found


def _equal(one: tuple[str, Path, int, int], other: tuple[str, Path, int, int]) -> bool:
    if (one[0], one[3] - one[2]) != (other[0], other[3] - other[2]):
        return False
    with one[1].open("rb") as first, other[1].open("rb") as second:
        views = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in (first, second)]
        with views[0], views[1]:
            step = 1 << 24
            return all(
                views[0][one[2] + i : min(one[2] + i + step, one[3])]
                == views[1][other[2] + i : min(other[2] + i + step, other[3])]
                for i in range(0, one[3] - one[2], step)
            )
