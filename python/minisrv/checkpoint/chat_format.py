"""How a model writes reasoning and tool calls, derived from its chat template instead of a flag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ToolFormat = Literal["hermes", "llama", "mistral", "qwen3_coder", "glm", "deepseek"]

# Those that are special tokens must stay in the text, or calls cannot be found.
_CALL_MARKERS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "glm": (
        *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
        *("<arg_value>", "</arg_value>"),
    ),
    "deepseek": (
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
}
_REASONING_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# What only the templates of these models contain, whose forms no parser reads. Some also contain
# the tags of a form that is read.
_UNREAD_FORMS = {
    "｜DSML｜": "DeepSeek V3.2 and V4",
    "<seed:tool_call>": "Seed-OSS",
    "<minimax:tool_call>": "MiniMax M2",
    "<invoke name=": "MiniMax M3",
    "<tool_calls>": "MiniMax M1 and Apriel",
    "<|tool_calls_section_begin|>": "Kimi K2",
    "<|channel|>": "gpt-oss",
    "<|tool_call>": "Gemma 4",
    "<|tool_call|>": "Granite 3",
    "<|tool_call:begin|>": "Solar Open",
    "<|tool_list_start|>": "LFM2",
    "<TOOLCALL>": "Nemotron Nano 2",
    "<|START_ACTION|>": "Command R7B and Command A",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """takes_tools: the template renders tools. tool_format: how the model writes calls, if tools
    can be used. unread_form: the models whose form of calls the template has instead, if known.
    reasoning_markers: the texts before and after the reasoning. switches_reasoning: the template
    has a variable that turns reasoning on or off, or sets its effort.
    """

    takes_tools: bool = False
    tool_format: ToolFormat | None = None
    unread_form: str | None = None
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
    unread_form = _find_unread_form(tools)
    tool_format = None if unread_form else _find_tool_format(tools)
    if tools and not takes_tools:
        tool_format = (tool_format or "hermes") if describes_tools else None
    return ChatFormat(
        takes_tools=takes_tools,
        tool_format=tool_format,
        unread_form=unread_form,
        reasoning_markers=next((marks for marks in _REASONING_MARKERS if marks[1] in text), None),
        switches_reasoning=re.search(r"\b(enable_thinking|thinking|reasoning_effort)\b", text)
        is not None,
    )


def _find_unread_form(template: str) -> str | None:
    for tag, models in _UNREAD_FORMS.items():
        if tag in template:
            return models
    return "Functionary" if "<function=" in template and "<tool_call>" not in template else None


def _find_tool_format(template: str) -> ToolFormat | None:
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek"
    if "<tool_call>" in template and "<arg_key>" in template:
        return "glm"
    if "<tool_call>" in template and "<function=" in template:
        return "qwen3_coder"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return "llama"
    return None
