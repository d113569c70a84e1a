"""`system_fingerprint`: with another one, the same request and seed may give another text."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from minisrv.config import ServerConfig


def fingerprint(config: ServerConfig) -> str:
    """A digest of what may change the text of a reply: version, weights and their arithmetic."""
    names = (
        *("model", "dtype", "quantization", "device", "attention_backend"),
        *("load_format", "tp", "joined_kernels", "decode_kernel"),
        "one_shot_all_reduce_kib",
    )
    values = json.dumps([getattr(config, name) for name in names])
    digest = hashlib.sha256(values.encode()).hexdigest()[:8]
    return f"minisrv-{version('minisrv')}-{digest}"
