"""The formats of tool calls by the names that `chat_format` gives them."""

from __future__ import annotations

import uuid
from collections.abc import Collection

from minisrv.checkpoint.chat_format import ToolFormat
from minisrv.frontend.tool_calls.hermes import HermesParser
from minisrv.frontend.tool_calls.llama import LlamaParser
from minisrv.frontend.tool_calls.mistral import MistralParser
from minisrv.frontend.tool_calls.parser import CallParser

_PARSERS: dict[ToolFormat, type[CallParser]] = {
    "hermes": HermesParser,
    "llama": LlamaParser,
    "mistral": MistralParser,
}


def make_parser(tool_format: ToolFormat, names: Collection[str], parallel: bool) -> CallParser:
    """A parser for one reply."""
    return _PARSERS[tool_format](frozenset(names), parallel)


def make_call_id(tool_format: ToolFormat) -> str:
    """A new id of a call. Mistral's templates take nine letters and digits, nothing else."""
    digits = uuid.uuid4().hex
    return digits[:9] if tool_format == "mistral" else f"call_{digits[:24]}"
