"""What the HTTP side knows of the model, once it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minisrv.chat_format import ChatFormat
from minisrv.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served model.

    name: what clients write in `model`. created: Unix seconds of the start.
    max_model_len: tokens of prompt and output together. defaults: the model's own sampling.
    chat_format: how it writes thoughts and tool calls.
    facts: what the processes told at their start.
    """

    name: str
    created: int
    max_model_len: int
    vocab_size: int
    defaults: SamplingParams
    chat_format: ChatFormat = field(default_factory=ChatFormat)
    facts: Mapping[str, Any] = field(default_factory=dict)
