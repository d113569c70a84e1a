"""The folder for what is made or downloaded once."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """$XDG_CACHE_HOME/minisrv, or ~/.cache/minisrv; None if it is not writable."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "minisrv"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the user has no home directory
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
