"""How a model writes reasoning and tool calls, derived from its chat template instead of a flag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ToolFormat = Literal["hermes", "llama", "mistral"]

# Those that are special tokens must stay in the text, or calls cannot be found.
_CALL_MARKERS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
}
_REASONING_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# Formats that use the same tag with other contents: XML (Qwen3-Coder), key-value tags (GLM).
_OTHER_TAGS = ("<function=", "<parameter=", "<arg_key>")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """takes_tools: the template renders tools. tool_format: how the model writes calls, if tools
    can be used.

    reasoning_markers: the texts before and after the reasoning. switches_reasoning: the template
    has a variable that turns reasoning on or off, or sets its effort.
    """

    takes_tools: bool = False
    tool_format: ToolFormat | None = None
    reasoning_markers: tuple[str, str] | None = None
    switches_reasoning: bool = False

    @property
    def needs_description(self) -> bool:
        """Whether the server has to describe tools in a system turn."""
        return self.tool_format is not None and not self.takes_tools

    @property
    def call_markers(self) -> tuple[str, ...]:
        return _CALL_MARKERS[self.tool_format] if self.tool_format else ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChatFormat:
        """The format from its fields as decoded from JSON."""
        reasoning = values["reasoning_markers"]
        return cls(**{**values, "reasoning_markers": reasoning and tuple(reasoning)})


def find_chat_format(templates: Mapping[str, str], *, describes_tools: bool = True) -> ChatFormat:
    """The format implied by a model's chat templates (source by name).

    describes_tools: tools are described to a model whose template takes none.
    """
    text = "\n".join(templates.values())
    tools = templates.get("tool_use", templates.get("default", ""))
    takes_tools = re.search(r"\btools\b", tools) is not None
    tool_format = _find_tool_format(tools) if takes_tools else None
    if tools and not takes_tools and describes_tools:
        tool_format = "hermes"
    return ChatFormat(
        takes_tools=takes_tools,
        tool_format=tool_format,
        reasoning_markers=next((marks for marks in _REASONING_MARKERS if marks[1] in text), None),
        switches_reasoning=re.search(r"\b(enable_thinking|thinking|reasoning_effort)\b", text)
        is not None,
    )


def _find_tool_format(template: str) -> ToolFormat | None:
    if any(tag in template for tag in _OTHER_TAGS):
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return "llama"
    return None
