"""How the calls in a reply are read: their format, the tools that may be called, and new ids."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import partial

from minisrv.checkpoint.chat_format import ToolFormat
from minisrv.frontend.tool_calls.hermes import HermesParser
from minisrv.frontend.tool_calls.llama import LlamaParser
from minisrv.frontend.tool_calls.mistral import MistralParser
from minisrv.frontend.tool_calls.parser import CallParser

PARSERS: dict[ToolFormat, type[CallParser]] = {
    "hermes": HermesParser,
    "llama": LlamaParser,
    "mistral": MistralParser,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReading:
    """What to read calls of: the tools `names`. Without `parallel` a reply has at most one call."""

    tool_format: ToolFormat
    names: tuple[str, ...]
    parallel: bool = True

    def make_parser(self) -> CallParser:
        parser_type = PARSERS[self.tool_format]
        make_id = partial(make_call_id, self.tool_format)
        return parser_type(frozenset(self.names), make_id, parallel=self.parallel)


def make_call_id(tool_format: ToolFormat) -> str:
    """A new id for a call. Mistral's templates accept only ids of nine letters and digits."""
    digits = uuid.uuid4().hex
    return digits[:9] if tool_format == "mistral" else f"call_{digits[:24]}"
