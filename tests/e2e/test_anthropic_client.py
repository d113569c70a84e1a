"""The anthropic client against the real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from demo_model.tools import add_tool, get_time_tool
from tests.support.questions import ANSWERS, COUNT
from tests.support.recording import Recorder
from tests.support.server_process import ServerProcess

TOOLS: list[Any] = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in (get_time_tool(), add_tool())
]
Ask = Callable[..., Message]


@pytest.fixture
def claude(server: ServerProcess, recorder: Recorder) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, http_client=recorder.client()
    ) as client:
        yield client


def whole(client: anthropic.Anthropic, messages: Any, **fields: Any) -> Message:
    return client.messages.create(model="demo", max_tokens=100, messages=messages, **fields)


def streamed(client: anthropic.Anthropic, messages: Any, **fields: Any) -> Message:
    with client.messages.stream(
        model="demo", max_tokens=100, messages=messages, **fields
    ) as stream:
        return stream.get_final_message()


@pytest.fixture(params=[whole, streamed], ids=["whole", "streamed"])
def send(request: pytest.FixtureRequest) -> Ask:
    return request.param  # type: ignore[no-any-return]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("question", ANSWERS)
def test_a_question_is_answered(claude: anthropic.Anthropic, send: Ask, question: str) -> None:
    message = send(claude, [user(question)], extra_body={"temperature": 0})
    (block,) = message.content
    assert block.type == "text"
    assert block.text == ANSWERS[question]
    assert message.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="demo", messages=[user(question)])  # type: ignore[list-item]
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_limits_and_stop_sequences_are_reported(claude: anthropic.Anthropic, send: Ask) -> None:
    stopped = send(claude, [user(COUNT)], stop_sequences=[" 5"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " 5")
    (block,) = stopped.content
    assert block.type == "text"
    assert block.text == "1 2 3 4"
    create = claude.messages.create
    cut = create(model="demo", max_tokens=3, messages=[user(COUNT)])  # type: ignore[list-item]
    assert cut.stop_reason == "max_tokens"
    assert cut.usage.output_tokens == 3


def test_a_tool_is_called_and_its_result_answered(claude: anthropic.Anthropic, send: Ask) -> None:
    turns = [user("What time is it in Oslo?")]
    message = send(claude, turns, tools=TOOLS)
    (call,) = message.content
    assert call.type == "tool_use"
    assert (call.name, call.input, message.stop_reason) == (
        "get_time",
        {"city": "Oslo"},
        "tool_use",
    )
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "14:05"}
    turns += [{"role": "assistant", "content": message.content}, user([result])]
    (block,) = send(claude, turns, tools=TOOLS).content
    assert block.type == "text"
    assert block.text == "It is 14:05 in Oslo."


def test_many_ask_at_once(server: ServerProcess, recorder: Recorder) -> None:
    async def ask_all() -> list[str]:
        http_client = recorder.async_client()
        async with anthropic.AsyncAnthropic(
            base_url=server.url, api_key="none", max_retries=0, http_client=http_client
        ) as client:
            messages: Any = [[user(question)] for question in ANSWERS]
            replies = await asyncio.gather(
                *(
                    client.messages.create(model="demo", max_tokens=100, messages=m)
                    for m in messages * 4
                )
            )
        return [block.text for reply in replies for block in reply.content if block.type == "text"]

    assert asyncio.run(ask_all()) == [*ANSWERS.values()] * 4


def test_refusals_are_the_packages_own(claude: anthropic.Anthropic, send: Ask) -> None:
    with pytest.raises(anthropic.BadRequestError, match="top_k"):
        send(claude, [user("Hi")], extra_body={"top_k": -5})
    with pytest.raises(anthropic.NotFoundError, match="served: 'demo'"):
        claude.messages.create(model="claude-9", max_tokens=1, messages=[user("Hi")])  # type: ignore[list-item]
