"""Where a checkpoint is GGUF instead of safetensors, and which files belong to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from minisrv.errors import ConfigError

MAGIC = b"GGUF"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def find_gguf(path: Path) -> tuple[Path, ...]:
    """The GGUF files of the checkpoint at `path`, in order; empty for one in safetensors.

    path: a GGUF file, one file of a split one, or a directory that holds one and no safetensors.
    Raises ConfigError if a part is missing, or the directory has several models.
    """
    if path.is_file():
        return _with_parts(path) if is_gguf_file(path) else ()
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or any(path.glob("*.safetensors")):
        return ()
    models = by_model(one.name for one in found)
    if len(models) > 1:
        raise ConfigError(f"{path} has several GGUF models: {', '.join(models)}; name one of them")
    return _with_parts(found[0])


def is_gguf_file(path: Path) -> bool:
    """Whether a file has the name or the first bytes of a GGUF file."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def by_model(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each model by the name of its first: a split model has several."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        split = _SPLIT.fullmatch(name)
        first = f"{split['stem']}-00001-of-{split['count']}.gguf" if split else name
        models.setdefault(first, []).append(name)
    return models


def _with_parts(path: Path) -> tuple[Path, ...]:
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return (path,)
    count = int(split["count"])
    parts = [
        path.with_name(f"{split['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise ConfigError(f"{part} does not exist; {path.name} is one of {count} files")
    return tuple(parts)
