"""What the scheduler reports of its model at the start."""

from __future__ import annotations

from typing import Any

from minisrv.checkpoint.generation_config import SAMPLING_DEFAULTS
from minisrv.checkpoint.model_config import ModelConfig
from minisrv.config import ServerConfig


def model_facts(model: ModelConfig, config: ServerConfig, max_seq_len: int) -> dict[str, Any]:
    """The model's facts for the frontend."""
    defaults = model.defaults_of(config.sampling_defaults)
    return {
        "max_seq_len": max_seq_len,
        "vocab_size": model.vocab_size,
        "sampling_defaults": {name: getattr(defaults, name) for name in SAMPLING_DEFAULTS},
        "sampling_source": model.sampling_source,
        "unapplied_defaults": model.unapplied_defaults,
        "notes": model.notes,
    }
