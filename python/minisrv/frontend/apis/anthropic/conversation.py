"""From Anthropic's turns of blocks to the messages that chat templates know."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.parts import TextParts, check_kind
from minisrv.frontend.fields.schema import (
    BOOLEAN,
    OBJECT,
    STRING,
    Schema,
    any_of,
    array_of,
    object_of,
)

ChatMessage = dict[str, Any]
Block = dict[str, Any]
Blocks = str | list[Block]

_TEXT_BLOCKS = TextParts(text="text")
_TEXTS = ("content", "reasoning_content")
_TEXT = object_of(["text"], text=STRING)
_TOOL_RESULT = object_of(
    ["tool_use_id"],
    tool_use_id=STRING,
    is_error=BOOLEAN,
    content=any_of(STRING, array_of(OBJECT)),
)
_TOOL_USE = object_of(["id", "name", "input"], id=STRING, name=STRING, input=OBJECT)
# By the role of a turn, the blocks that it may hold.
_BLOCKS: dict[str, dict[str, Schema]] = {
    "system": {"text": _TEXT},
    "user": {"text": _TEXT, "tool_result": _TOOL_RESULT},
    "assistant": {
        "text": _TEXT,
        "thinking": object_of(["thinking"], thinking=STRING),
        "redacted_thinking": OBJECT,
        "tool_use": _TOOL_USE,
    },
}


def chat_messages(system: Blocks | None, turns: list[dict[str, Any]]) -> list[ChatMessage]:
    """The messages. Turns of one role that follow each other are one turn, as at Anthropic.

    If the last one is the assistant's, the reply is to go on with it.
    Raises InvalidRequestError naming the block.
    """
    if not turns:
        raise InvalidRequestError("messages is empty; it must hold a turn", param="messages")
    conversation = _Conversation()
    if system is not None:
        conversation.add({"role": "system", "content": _TEXT_BLOCKS.read(system, "system")})
    for i, turn in enumerate(turns):
        conversation.read_turn(turn, f"messages.{i}.content")
    messages = conversation.messages()
    if messages[-1]["role"] == "assistant" and "tool_calls" in messages[-1]:
        path = f"messages.{len(turns) - 1}.content"
        raise InvalidRequestError(
            f"{path} ends with a call; send its result, or a turn of text to go on with", param=path
        )
    return messages


class _Conversation:
    """The messages so far, and the names of the tools by the ids of their calls.

    The texts of a message are lists of pieces, of which there may be many.
    """

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._names: dict[str, str] = {}

    def messages(self) -> list[ChatMessage]:
        return [_joined(message) for message in self._messages]

    def add(self, message: ChatMessage) -> None:
        """Another message, or more of the last one."""
        role = message["role"]
        if not self._messages or role == "tool" or role != self._messages[-1]["role"]:
            begun: ChatMessage = {**message, "content": [], "reasoning_content": []}
            begun.pop("tool_calls", None)
            self._messages.append(begun)
        last = self._messages[-1]
        for name in _TEXTS:
            if text := message.get(name):
                last[name].append(text)
        if "tool_calls" in message:
            last.setdefault("tool_calls", []).extend(message["tool_calls"])

    def read_turn(self, turn: dict[str, Any], path: str) -> None:
        """The message or messages of one turn."""
        role, content = turn["role"], turn["content"]
        if isinstance(content, str):
            return self.add({"role": role, "content": content})
        if not content:
            raise InvalidRequestError(f"{path} is empty; it must hold a block", param=path)
        for i, block in enumerate(content):
            check_kind(block, _BLOCKS[role], f"{path}.{i}")
        if role == "assistant":
            self._read_assistant(content)
        else:
            self._read_user(role, content, path)

    def _read_user(self, role: str, blocks: list[Block], path: str) -> None:
        """Results are messages of their own; the text between two of them is one message."""
        for kind, group in groupby(enumerate(blocks), key=lambda item: item[1]["type"]):
            if kind == "text":
                self.add({"role": role, "content": _join([b for _, b in group], "text")})
                continue
            for i, block in group:
                self.add(self._result(block, f"{path}.{i}.content"))

    def _result(self, block: Block, path: str) -> ChatMessage:
        content = _TEXT_BLOCKS.read(block.get("content") or "", path)
        if block.get("is_error"):
            content = f"Error: {content}" if content else "Error"
        call_id = block["tool_use_id"]
        message = {"role": "tool", "tool_call_id": call_id, "content": content}
        name = self._names.get(call_id)
        return message if name is None else {**message, "name": name}

    def _read_assistant(self, blocks: list[Block]) -> None:
        """Redacted reasoning is not ours, and a template could not show it."""
        message: ChatMessage = {"role": "assistant", "content": _join(blocks, "text")}
        if reasoning := _join(blocks, "thinking"):
            message["reasoning_content"] = reasoning
        if calls := [_call(block) for block in blocks if block["type"] == "tool_use"]:
            message["tool_calls"] = calls
            self._names |= {call["id"]: call["function"]["name"] for call in calls}
        self.add(message)


def _joined(message: ChatMessage) -> ChatMessage:
    joined = {**message, **{name: "\n\n".join(message[name]) for name in _TEXTS}}
    if not joined["reasoning_content"]:
        del joined["reasoning_content"]
    return joined


def _join(blocks: list[Block], kind: str) -> str:
    return "".join(block[kind] for block in blocks if block["type"] == kind)


def _call(block: Block) -> dict[str, Any]:
    function = {"name": block["name"], "arguments": block["input"]}
    return {"id": block["id"], "type": "function", "function": function}
