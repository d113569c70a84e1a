"""Request bodies up to the size limit that are costly to read, or were: legal and not.

Each is a path and a JSON text of at most MAX_BYTES, made of a few bytes that repeat.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MAX_BYTES = 8 * 2**20

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"


def _fill(
    before: str, item: str | bytes, after: str, separator: str = ",", max_bytes: int = MAX_BYTES
) -> bytes:
    """`item` again and again between `before` and `after`, up to max_bytes."""
    unit = (item.encode() if isinstance(item, str) else item) + separator.encode()
    room = max_bytes - len(before.encode()) - len(after.encode())
    return (
        before.encode()
        + (unit * (room // len(unit))).removesuffix(separator.encode())
        + (after.encode())
    )


def _fields(before: str, name: str, value: str, after: str, max_bytes: int = MAX_BYTES) -> bytes:
    """An object with members name0, name1 and so on, all of the same value."""
    room = max_bytes - len(before) - len(after)
    size = len(name) + len(value) + 11
    members = (f'"{name}{i:07}":{value}' for i in range(room // size))
    return (before + ",".join(members) + after).encode()


def _chat(**fields: Any) -> str:
    """The start of a chat's body: all of it but the closing brace."""
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields})[
        :-1
    ]


_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_CALL = '{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}'


def _calls_of(arguments: str) -> tuple[str, str]:
    """What stands before and after the text of a call's arguments."""
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "@"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    before, _, after = json.dumps({"messages": messages, "max_tokens": 4}).partition("@")
    opening, closing = arguments.split("@")
    return before + opening, closing + after


_OPEN_IDS, _CLOSE_IDS = _calls_of('{\\"a\\":[@]}')

# By what they are made of: a path and a function that makes the body.
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    # Prompts and token ids.
    "one-id prompts": (COMPLETIONS, lambda: _fill('{"prompt":[', "[7]", "]}")),
    "empty prompts": (COMPLETIONS, lambda: _fill('{"prompt":[', "[]", "]}")),
    "4,000 text prompts": (
        COMPLETIONS,
        lambda: json.dumps({"prompt": ["go"] * 4000, "max_tokens": 1}).encode(),
    ),
    "4,000 id prompts": (
        COMPLETIONS,
        lambda: json.dumps({"prompt": [[65, 66]] * 4000, "max_tokens": 1}).encode(),
    ),
    "text prompts": (COMPLETIONS, lambda: _fill('{"prompt":[', '"a"', "]}")),
    "token ids": (COMPLETIONS, lambda: _fill('{"prompt":[', "7", "]}")),
    "long token ids": (COMPLETIONS, lambda: _fill('{"prompt":[', "123456", "]}")),
    "a million token ids": (
        COMPLETIONS,
        lambda: _fill('{"prompt":[', "255", "]}", max_bytes=4 * 10**6),
    ),
    "200,000 token ids": (
        COMPLETIONS,
        lambda: _fill('{"prompt":[', "123456", "]}", max_bytes=7 * 200_000),
    ),
    "spaced token ids": (COMPLETIONS, lambda: _fill('{"prompt":[', "7", "]}", ", \n")),
    "input_ids": ("/generate", lambda: _fill('{"input_ids":[', "7", "]}")),
    "tokens to spell": ("/detokenize", lambda: _fill('{"tokens":[', "65", "]}")),
    "floats as prompt": (COMPLETIONS, lambda: _fill('{"prompt":[', "1.5", "]}")),
    # Texts.
    "text": (COMPLETIONS, lambda: _fill('{"max_tokens":4,"prompt":"', "word ", '"}', "")),
    "text of commas": (COMPLETIONS, lambda: _fill('{"max_tokens":4,"prompt":"', "a, b", '"}')),
    "text of brackets": (COMPLETIONS, lambda: _fill('{"prompt":"', "[1,2],{3}", '"}')),
    "text of newlines": (COMPLETIONS, lambda: _fill('{"prompt":"', "\\n", '"}', "")),
    "text of quotes": (COMPLETIONS, lambda: _fill('{"prompt":"', '\\"', '"}', "")),
    "text of backslashes": (COMPLETIONS, lambda: _fill('{"prompt":"', "\\\\", '"}', "")),
    "text of escapes": (COMPLETIONS, lambda: _fill('{"prompt":"', "\\u4f60", '"}', "")),
    "text of pairs": (COMPLETIONS, lambda: _fill('{"prompt":"', "\\ud83d\\ude00", '"}', "")),
    "text of lone surrogates": (COMPLETIONS, lambda: _fill('{"prompt":"', "\\ud83d", '"}', "")),
    "text in Chinese": (COMPLETIONS, lambda: _fill('{"prompt":"', "你", '"}', "")),
    "text of emoji": (COMPLETIONS, lambda: _fill('{"prompt":"', "😀", '"}', "")),
    "text to tokenize": ("/tokenize", lambda: _fill('{"prompt":"', "word ", '"}', "")),
    "text to generate": ("/generate", lambda: _fill('{"text":"', "word ", '"}', "")),
    "text in a chat": (
        CHAT,
        lambda: _fill('{"messages":[{"role":"user","content":"', "a, b", '"}]}'),
    ),
    "text as input": (RESPONSES, lambda: _fill('{"input":"', "a, b", '"}')),
    # Conversations.
    "messages": (CHAT, lambda: _fill('{"messages":[', '{"role":"user","content":"a"}', "]}")),
    "messages up to the limit": (
        CHAT,
        lambda: _fill(
            '{"messages":[', '{"role":"user","content":"a"}', "]}", max_bytes=30 * 10_900
        ),
    ),
    "messages of 800 bytes": (
        CHAT,
        lambda: _fill('{"messages":[', '{"role":"user","content":"' + "a" * 770 + '"}', "]}"),
    ),
    "system messages": (
        RESPONSES,
        lambda: _fill('{"input":[', '{"role":"system","content":"' + "a" * 770 + '"}', "]}"),
    ),
    "content parts": (
        CHAT,
        lambda: _fill(
            '{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]}"
        ),
    ),
    "content parts up to the limit": (
        CHAT,
        lambda: _fill(
            '{"messages":[{"role":"user","content":[',
            '{"type":"text","text":"a"}',
            "]}]}",
            max_bytes=27 * 10_900,
        ),
    ),
    "turns": (
        MESSAGES,
        lambda: _fill('{"max_tokens":4,"messages":[', '{"role":"user","content":"a"}', "]}"),
    ),
    "turns of 800 bytes": (
        MESSAGES,
        lambda: _fill(
            '{"max_tokens":4,"messages":[',
            '{"role":"user","content":"' + "a" * 770 + '"}',
            "]}",
        ),
    ),
    "calls of one turn after the other": (
        MESSAGES,
        lambda: _fill(
            '{"max_tokens":4,"messages":[{"role":"user","content":"a"},',
            '{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"f","input":{}}]}',
            ',{"role":"user","content":"a"}]}',
            max_bytes=81 * 2_900,
        ),
    ),
    "blocks": (
        MESSAGES,
        lambda: _fill(
            '{"max_tokens":4,"messages":[{"role":"user","content":[',
            '{"type":"text","text":"a"}',
            "]}]}",
        ),
    ),
    "blocks to count": (
        MESSAGES + "/count_tokens",
        lambda: _fill(
            '{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]}"
        ),
    ),
    "input items": (
        RESPONSES,
        lambda: _fill('{"input":[', '{"role":"user","content":"a"}', "]}"),
    ),
    "reasoning items": (
        RESPONSES,
        lambda: _fill(
            '{"input":[{"role":"user","content":"a"},',
            '{"type":"reasoning","content":[{"type":"text","text":"' + "a" * 700 + '"}]}',
            "]}",
        ),
    ),
    "texts after a call": (
        RESPONSES,
        lambda: _fill(
            '{"input":[{"role":"user","content":"a"},'
            '{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},',
            '{"role":"assistant","content":"' + "a" * 770 + '"}',
            "]}",
        ),
    ),
    "tool calls": (
        CHAT,
        lambda: _fill(
            '{"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[',
            _CALL,
            ']},{"role":"user","content":"a"}]}',
        ),
    ),
    "arguments of many numbers": (CHAT, lambda: _fill(_OPEN_IDS, "1", _CLOSE_IDS)),
    "arguments of many texts": (CHAT, lambda: _fill(_OPEN_IDS, '\\"\\"', _CLOSE_IDS)),
    "arguments of one text": (
        CHAT,
        lambda: _fill(
            *_calls_of('{\\"a\\":\\"@\\"}')[:1], "word ", _calls_of('{\\"a\\":\\"@\\"}')[1], ""
        ),
    ),
    # Tools, schemas and other fields.
    "tools": (
        CHAT,
        lambda: _fill(_chat() + ',"tools":[', json.dumps(_TOOL), "]}"),
    ),
    "a tool of many properties": (
        CHAT,
        lambda: _fields(
            _chat()
            + ',"tools":[{"type":"function","function":{"name":"f","parameters":{"properties":{',
            "p",
            '{"type":"string"}',
            "}}}}]}",
        ),
    ),
    "a schema of many properties": (
        CHAT,
        lambda: _fields(
            _chat() + ',"response_format":{"type":"json_schema","json_schema":{"name":"n",'
            '"schema":{"properties":{',
            "p",
            '{"type":"string"}',
            "}}}}}",
        ),
    ),
    "a schema of one long enum": (
        CHAT,
        lambda: _fill(_chat() + ',"guided_json":{"enum":[', "1", "]}}"),
    ),
    "a schema as text": (
        CHAT,
        lambda: _fill(_chat() + ',"guided_json":"{\\"enum\\":[', "1", ']}"}'),
    ),
    "choices": (CHAT, lambda: _fill(_chat() + ',"guided_choice":[', '"a"', "]}")),
    "a regex": (CHAT, lambda: _fill(_chat() + ',"guided_regex":"', "a", '"}', "|")),
    "logit_bias": (COMPLETIONS, lambda: _fields('{"prompt":"a","logit_bias":{', "", "1", "}}")),
    "logit_bias up to the limit": (
        COMPLETIONS,
        lambda: _fields('{"prompt":"a","logit_bias":{', "", "1", "}}", 32_000 * 12),
    ),
    "stop strings": (COMPLETIONS, lambda: _fill('{"prompt":"a","stop":[', '"b"', "]}")),
    "stop ids": (COMPLETIONS, lambda: _fill('{"prompt":"a","stop_token_ids":[', "5", "]}")),
    "metadata": (RESPONSES, lambda: _fields('{"input":"a","metadata":{', "k", '"v"', "}}")),
    "template variables": (
        CHAT,
        lambda: _fields(_chat() + ',"chat_template_kwargs":{', "k", "1", "}}"),
    ),
    "unknown fields": (
        COMPLETIONS,
        lambda: _fields('{"prompt":"a","max_tokens":4,', "k", "1", "}"),
    ),
    "unknown fields up to the limit": (
        COMPLETIONS,
        lambda: _fields('{"prompt":"a","max_tokens":4,', "k", "1", "}", 13 * 32_000),
    ),
    "a long unknown field": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","max_tokens":4,"', "名", '":1}', ""),
    ),
    "an unknown field of numbers": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","max_tokens":4,"x":[', "12", "]}"),
    ),
    "an unknown field of text": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","max_tokens":4,"x":"', "a\\t", '"}', ""),
    ),
    "a long name of structured output": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","structured_outputs":{"', "n", '":1}}', ""),
    ),
    "a long request id": (COMPLETIONS, lambda: _fill('{"prompt":"a","rid":"', "n", '"}', "")),
    "a long model name": (COMPLETIONS, lambda: _fill('{"prompt":"a","model":"', "n", '"}', "")),
    # What is not JSON, or nearly so.
    "spaces": (COMPLETIONS, lambda: b" " * MAX_BYTES),
    "spaces before the end": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","max_tokens":4', " ", "}", ""),
    ),
    "nested arrays": (COMPLETIONS, lambda: b'{"prompt":' + b"[" * (MAX_BYTES - 20)),
    "nested objects": (COMPLETIONS, lambda: _fill("", '{"a":', "1", "")),
    "empty objects": (COMPLETIONS, lambda: _fill('{"prompt":"a","x":[', "{}", "]}")),
    "keys that repeat": (COMPLETIONS, lambda: _fill('{"prompt":"a",', '"a":1', "}")),
    "a long key that repeats": (
        COMPLETIONS,
        lambda: b'{"%b":1,"%b":2}' % (b"k" * (MAX_BYTES // 2 - 10), b"k" * (MAX_BYTES // 2 - 10)),
    ),
    "a long number": (COMPLETIONS, lambda: _fill('{"prompt":"a","seed":1', "2", "}", "")),
    "numbers of 4,300 digits": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","max_tokens":4,"x":[', "9" * 4300, "]}"),
    ),
    "fractions of 4,000 digits": (
        COMPLETIONS,
        lambda: _fill('{"prompt":"a","max_tokens":4,"x":[', "0." + "3" * 4000, "]}"),
    ),
    "quotes": (COMPLETIONS, lambda: b'"' * MAX_BYTES),
    "commas": (COMPLETIONS, lambda: b"[" + b"," * (MAX_BYTES - 1)),
    "bytes that are no text": (
        COMPLETIONS,
        lambda: b'{"prompt":"' + b"\xff" * (MAX_BYTES - 13) + b'"}',
    ),
    "zeros": (COMPLETIONS, lambda: bytes(MAX_BYTES)),
}
