"""How the calls in a reply are read: their format, the tools that may be called, and new ids."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from minisrv.checkpoint.chat_format import ToolFormat
from minisrv.frontend.tool_calls.deepseek import DeepSeekParser
from minisrv.frontend.tool_calls.glm import GlmParser
from minisrv.frontend.tool_calls.hermes import HermesParser
from minisrv.frontend.tool_calls.llama import LlamaParser
from minisrv.frontend.tool_calls.mistral import MistralParser
from minisrv.frontend.tool_calls.parser import CallParser
from minisrv.frontend.tool_calls.qwen3_coder import Qwen3CoderParser

PARSERS: dict[ToolFormat, type[CallParser]] = {
    "hermes": HermesParser,
    "llama": LlamaParser,
    "mistral": MistralParser,
    "qwen3_coder": Qwen3CoderParser,
    "glm": GlmParser,
    "deepseek": DeepSeekParser,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReading:
    """What to read calls of: tools, by name the schemas of their arguments.

    Without `parallel` a reply has at most one call.
    """

    tool_format: ToolFormat
    schemas: Mapping[str, Any]
    parallel: bool = True

    def make_parser(self) -> CallParser:
        parser_type = PARSERS[self.tool_format]
        make_id = partial(make_call_id, self.tool_format)
        return parser_type(self.schemas, make_id, parallel=self.parallel)


def make_call_id(tool_format: ToolFormat) -> str:
    """A new id for a call. Mistral's templates accept only ids of nine letters and digits."""
    digits = uuid.uuid4().hex
    return digits[:9] if tool_format == "mistral" else f"call_{digits[:24]}"
