"""Reads the input of a response, a list of items, as the messages that chat templates know.

One turn of the model (reasoning, text and calls) is several items, but one message.
"""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.history import GiveWay, History, Item
from minisrv.frontend.apis.responses.left_out import LeftOut
from minisrv.frontend.apis.responses.tools import Callee, custom_arguments
from minisrv.frontend.fields.parts import TextParts, check_kind
from minisrv.frontend.fields.schema import (
    OBJECT,
    STRING,
    Schema,
    any_of,
    array_of,
    check_value,
    object_of,
    one_of,
)
from minisrv.frontend.generation.request import Messages

Message = dict[str, Any]

PIECE_ITEMS = 1000  # take some 4 ms

_CONTENT = any_of(STRING, array_of(OBJECT))
_OUTPUT = object_of(["call_id", "output"], call_id=STRING, output=_CONTENT)
_ITEMS: dict[str, Schema] = {
    "message": object_of(
        ["role", "content"],
        role=one_of("user", "assistant", "system", "developer"),
        content=_CONTENT,
    ),
    "function_call": object_of(
        ["call_id", "name", "arguments"],
        call_id=STRING,
        name=STRING,
        namespace=STRING,
        arguments=STRING,
    ),
    "custom_tool_call": object_of(
        ["call_id", "name", "input"],
        call_id=STRING,
        name=STRING,
        namespace=STRING,
        input=STRING,
    ),
    "function_call_output": _OUTPUT,
    "custom_tool_call_output": _OUTPUT,
    "reasoning": object_of(content=array_of(OBJECT), summary=array_of(OBJECT)),
}
# What tools of OpenAI's own server have done. `additional_tools` are read with the tools.
_HOSTED_ITEMS = frozenset(
    {
        *("web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call"),
        *("computer_call", "computer_call_output", "local_shell_call", "local_shell_call_output"),
        *("shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output"),
        *("mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"),
        *("tool_search_call", "tool_search_output", "program", "program_output"),
    }
)
_MEDIA_PARTS = frozenset({"input_image", "input_file", "input_audio"})
_WITH_TYPE = object_of(["type"], type=STRING)
_TEXT_PARTS = TextParts(input_text="text", output_text="text", text="text", refusal="refusal")
_REASONING_PARTS = TextParts(reasoning_text="text", summary_text="text", text="text")
_SYSTEM_ROLES = frozenset({"system", "developer"})
_TEXTS = ("content", "reasoning_content")


async def read_conversation(
    instructions: str | None, history: History, left_out: LeftOut, give_way: GiveWay
) -> Messages:
    """The messages of `instructions` and of all items. Raises InvalidRequestError naming the item.

    left_out: takes the items that the model does not see.
    give_way: lets other requests run; awaited after every PIECE_ITEMS items.
    """
    given = history.given
    if given is None or given == []:
        state = "missing" if given is None else "empty"
        raise InvalidRequestError(
            f"input is {state}; it must be a text or hold at least one item", param="input"
        )
    conversation = _Conversation()
    if instructions is not None:
        conversation.add_message("system", instructions)
    named = [("previous_response_id", history.past)]
    if isinstance(given, list):
        named.append(("input", given))
    for name, items in named:
        for i, item in enumerate(items):
            _add_item(conversation, item, f"{name}.{i}", left_out)
            if i % PIECE_ITEMS == PIECE_ITEMS - 1:
                await give_way()
    if isinstance(given, str):
        conversation.add_message("user", given)
    return await conversation.messages(give_way)


class _Conversation:
    """The messages so far. Their texts are lists of pieces, of which there may be many."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    async def messages(self, give_way: GiveWay) -> Messages:
        messages = []
        for i, message in enumerate(self._messages):
            messages.append(_joined(message))
            if i % PIECE_ITEMS == PIECE_ITEMS - 1:
                await give_way()
        return tuple(messages)

    def add_message(self, role: str, text: str) -> None:
        """A message of anybody but the model. Templates take one system message, in front."""
        first = self._messages[0] if len(self._messages) == 1 else None
        if first is not None and {role, first["role"]} <= _SYSTEM_ROLES:
            first["role"] = "system"
            first["content"] += ["\n\n", text]
        else:
            self._messages.append({"role": role, "content": [text]})

    def add_output(self, call_id: str, text: str) -> None:
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": [text]})

    def add_reasoning(self, text: str) -> None:
        turn = self._turn()
        if turn["content"] or "tool_calls" in turn:
            turn = self._begin_turn()
        turn.setdefault("reasoning_content", []).append(text)

    def add_text(self, text: str) -> None:
        turn = self._turn()
        if turn["content"] and "tool_calls" not in turn:
            turn = self._begin_turn()
        turn["content"] += [text] if text else []

    def add_call(self, item: Item, arguments: str) -> None:
        name = Callee(item["name"], item.get("namespace")).shown_name
        function = {"name": name, "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._turn().setdefault("tool_calls", []).append(call)

    def _turn(self) -> Message:
        if self._messages and self._messages[-1]["role"] == "assistant":
            return self._messages[-1]
        return self._begin_turn()

    def _begin_turn(self) -> Message:
        self._messages.append({"role": "assistant", "content": []})
        return self._messages[-1]


def _joined(message: Message) -> Message:
    """The message with its texts. Calls without text have no content, as in a chat."""
    texts = {name: "".join(message[name]) for name in _TEXTS if name in message}
    joined = {**message, **texts}
    if not joined["content"] and "tool_calls" in joined:
        joined["content"] = None
    return joined


def _add_item(conversation: _Conversation, item: Item, path: str, left_out: LeftOut) -> None:
    if "role" in item and not item.get("type"):
        item = {**item, "type": "message"}
    if not isinstance(item.get("type"), str):
        check_value(item, _WITH_TYPE, path)
    if item["type"] == "additional_tools":
        return
    if item["type"] in _HOSTED_ITEMS:
        return left_out.add_item(item["type"], f"{path}.type")
    match check_kind(item, _ITEMS, path):
        case "message":
            text = _TEXT_PARTS.read(item["content"], f"{path}.content")
            if item["role"] == "assistant":
                conversation.add_text(text)
            else:
                conversation.add_message(item["role"], text)
        case "function_call":
            conversation.add_call(item, item["arguments"])
        case "custom_tool_call":
            conversation.add_call(item, custom_arguments(item["input"]))
        case "function_call_output" | "custom_tool_call_output":
            output = _without_media(item["output"], f"{path}.output", left_out)
            text = _TEXT_PARTS.read(output, f"{path}.output")
            conversation.add_output(item["call_id"], text)
        case "reasoning":
            if reasoning := _read_reasoning(item, path):
                conversation.add_reasoning(reasoning)


def _without_media(output: str | list[Item], path: str, left_out: LeftOut) -> str | list[Item]:
    """The output of a tool, with a text in the place of each image, file and sound."""
    if isinstance(output, str):
        return output
    parts = []
    for i, part in enumerate(output):
        if part.get("type") in _MEDIA_PARTS:
            left_out.add_item(part["type"], f"{path}.{i}.type")
            kind = part["type"].removeprefix("input_")
            part = {"type": "text", "text": f"[{kind} left out: this model reads only text]"}
        parts.append(part)
    return parts


def _read_reasoning(item: Item, path: str) -> str:
    """The reasoning, or else its summary; encrypted reasoning cannot be read."""
    for name in ("content", "summary"):
        if text := _REASONING_PARTS.read(item.get(name) or [], f"{path}.{name}"):
            return text
    return ""
