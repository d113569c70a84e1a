"""`system_fingerprint`, by which a client sees that the same request may give another text."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from minisrv.config import ServerConfig


def fingerprint(config: ServerConfig) -> str:
    """Changes with what may change the text of a request: version, weights and their arithmetic."""
    names = ("model", "dtype", "device", "attention_backend", "load_format", "tp")
    values = json.dumps([getattr(config, name) for name in names])
    digest = hashlib.sha256(values.encode()).hexdigest()[:8]
    return f"minisrv-{version('minisrv')}-{digest}"
