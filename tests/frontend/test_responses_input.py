"""The input of a response: its items become the messages of a chat, or are refused."""

from typing import Any

import pytest

from tests.support.http_server import HttpServer
from tests.support.response_wire import CALL_ITEM, OUTPUT_ITEM, USER, last_request

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
OUTPUT = {"role": "tool", "tool_call_id": "c1", "content": "2"}


def thought(text: str, part: str = "content") -> dict[str, Any]:
    kind = "reasoning_text" if part == "content" else "summary_text"
    return {"type": "reasoning", "id": "rs_1", "summary": [], part: [{"type": kind, "text": text}]}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("hi", [USER]),
        ([USER], [USER]),
        ([{**USER, "type": "message", "status": "completed", "id": "msg_1"}], [USER]),
        (
            [
                {"role": "developer", "content": "A"},
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": part} for part in "hi"],
                },
            ],
            [{"role": "developer", "content": "A"}, USER],
        ),
        (
            [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, USER],
            [{"role": "system", "content": "A\n\nB"}, USER],
        ),
        (
            [USER, {"role": "system", "content": "A"}],
            [USER, {"role": "system", "content": "A"}],
        ),
        (
            [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "output_text", "text": "a", "annotations": []},
                        {"type": "refusal", "refusal": "b"},
                    ],
                },
                {"role": "assistant", "content": "c"},
            ],
            [USER, {"role": "assistant", "content": "ab"}, {"role": "assistant", "content": "c"}],
        ),
        (
            [
                USER,
                thought("hm"),
                {"role": "assistant", "content": "a"},
                CALL_ITEM,
                CALL_ITEM,
                OUTPUT_ITEM,
            ],
            [
                USER,
                {
                    "role": "assistant",
                    "reasoning_content": "hm",
                    "content": "a",
                    "tool_calls": [CALL, CALL],
                },
                OUTPUT,
            ],
        ),
        (
            [
                USER,
                thought("s", "summary"),
                CALL_ITEM,
                OUTPUT_ITEM,
                thought("t"),
                CALL_ITEM,
                OUTPUT_ITEM,
            ],
            [
                USER,
                {
                    "role": "assistant",
                    "reasoning_content": "s",
                    "content": None,
                    "tool_calls": [CALL],
                },
                OUTPUT,
                {
                    "role": "assistant",
                    "reasoning_content": "t",
                    "content": None,
                    "tool_calls": [CALL],
                },
                OUTPUT,
            ],
        ),
        (
            [
                USER,
                {"role": "assistant", "content": "a"},
                CALL_ITEM,
                {"role": "assistant", "content": "b"},
            ],
            [USER, {"role": "assistant", "content": "ab", "tool_calls": [CALL]}],
        ),
        (
            [USER, {"role": "assistant", "content": "a"}, thought("t"), CALL_ITEM],
            [
                USER,
                {"role": "assistant", "content": "a"},
                {
                    "role": "assistant",
                    "reasoning_content": "t",
                    "content": None,
                    "tool_calls": [CALL],
                },
            ],
        ),
        (
            [
                USER,
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"},
                {**OUTPUT_ITEM, "output": [{"type": "input_text", "text": "2"}]},
            ],
            [USER, OUTPUT],
        ),
    ],
)
def test_items_become_the_messages_of_a_chat(
    server: HttpServer, items: Any, messages: list[Any]
) -> None:
    assert list(last_request(server, input=items).messages) == messages


def test_instructions_stand_in_front(server: HttpServer) -> None:
    request = last_request(server, instructions="Be brief.")
    assert list(request.messages) == [{"role": "system", "content": "Be brief."}, USER]
    items = [{"role": "developer", "content": "Or not."}, USER]
    request = last_request(server, instructions="Be brief.", input=items)
    assert list(request.messages) == [
        {"role": "system", "content": "Be brief.\n\nOr not."},
        USER,
    ]
