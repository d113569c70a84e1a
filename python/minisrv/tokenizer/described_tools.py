"""Tools for a chat template that takes none: a system turn describes them and the form of calls.

Earlier calls and their results, which such a template does not know either, become text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Message = dict[str, Any]

_LIST = """\
# Tools

You can call the functions that are listed here between <tools> and </tools>, one on each line, \
with a JSON schema of the arguments:
<tools>
{tools}
</tools>
"""
_HERMES = """
Call a function by writing a JSON object with its name and its arguments between <tool_call> and \
</tool_call>:
<tool_call>
{"name": "function-name", "arguments": {"argument-name": "value"}}
</tool_call>
The results of your calls follow between <tool_response> and </tool_response>."""
_DEEPSEEK = """
Call functions by writing, and nothing after it:
"""
_DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function-name<｜tool▁sep｜>"
    '{"argument-name": "value"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
_DEEPSEEK_FENCED_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>function-name\n"
    '```json\n{"argument-name": "value"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def describe_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: str
) -> list[Message]:
    """The messages with the tools at the end of the first turn, if that is a system turn, or in a
    system turn of their own before it.

    template: the source of the chat template, which may show a form of calls.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _LIST.format(tools=listed) + _form_of_calls(template)
    if messages and messages[0].get("role") == "system":
        first, *others = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *others]
    return [{"role": "system", "content": text}, *messages]


def _form_of_calls(template: str) -> str:
    if "<｜tool▁calls▁begin｜>" not in template:
        return _HERMES
    return _DEEPSEEK + (_DEEPSEEK_FENCED_CALL if "```json" in template else _DEEPSEEK_CALL)


def write_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls in the content of the assistant, and results in turns of the user."""
    written = []
    for by_tool, group in groupby(messages, lambda message: message.get("role") == "tool"):
        if by_tool:
            results = [
                f"<tool_response>\n{message['content']}\n</tool_response>" for message in group
            ]
            written.append({"role": "user", "content": "\n".join(results)})
        else:
            written += map(_write_calls, group)
    return written


def _write_calls(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    texts = [message["content"]] if message.get("content") else []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"].get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        object = f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
        texts.append(f"<tool_call>\n{object}\n</tool_call>")
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join(texts)}
