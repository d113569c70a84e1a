"""pydantic-ai agents against the real server."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput, UsageLimits, capture_run_messages
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.support.questions import ANSWERS, COUNT
from tests.support.recording import Recorder
from tests.support.server_process import ServerProcess

SETTINGS = ModelSettings(max_tokens=100, parallel_tool_calls=False)
# pydantic-ai knows by name which of Anthropic's models take a schema.
NATIVE = ModelProfile(supports_json_schema_output=True)


class Entry(BaseModel):
    """An entry of a list; bounded, so that the text ends whatever the model would write."""

    city: Literal["Oslo", "Rome", "Lima"]
    number: int = Field(ge=0, le=999)


@pytest.fixture(params=["chat", "responses", "messages"])
def model(request: pytest.FixtureRequest, server: ServerProcess, recorder: Recorder) -> Model:
    """The model through each of the three APIs."""
    http_client = recorder.async_client()
    if request.param == "messages":
        claude = AnthropicProvider(base_url=server.url, api_key="none", http_client=http_client)
        return AnthropicModel("demo", provider=claude, settings=SETTINGS, profile=NATIVE)
    openai = OpenAIProvider(base_url=f"{server.url}/v1", http_client=http_client)
    if request.param == "responses":
        return OpenAIResponsesModel("demo", provider=openai, settings=SETTINGS)
    return OpenAIChatModel("demo", provider=openai, settings=SETTINGS)


def test_an_agent_answers_with_text(model: Model) -> None:
    result = asyncio.run(Agent(model).run(COUNT))
    assert result.output == ANSWERS[COUNT]
    assert result.usage.output_tokens > 0
    assert result.usage.requests == 1


def test_an_agent_streams_its_text(model: Model, recorder: Recorder) -> None:
    async def run() -> tuple[list[str], int]:
        async with Agent(model).run_stream(COUNT) as result:
            deltas = [delta async for delta in result.stream_text(delta=True, debounce_by=None)]
        return deltas, result.usage.output_tokens

    deltas, num_tokens = asyncio.run(run())
    assert [exchange.streamed for exchange in recorder.exchanges] == [True]
    assert "".join(deltas) == ANSWERS[COUNT]
    assert num_tokens > 0


def test_an_agent_remembers_the_conversation(model: Model) -> None:
    async def run() -> str:
        agent = Agent(model)
        first = await agent.run("My name is Ana.")
        second = await agent.run("What is my name?", message_history=first.all_messages())
        return second.output

    assert "Ana" in asyncio.run(run())


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_gives_a_typed_result(model: Model, kind: Any, stream: bool) -> None:
    agent: Agent[None, Entry] = Agent(model, output_type=kind(Entry))
    question = "Answer in JSON: city is Oslo, number is 42"

    async def run() -> Entry:
        if not stream:
            return (await agent.run(question)).output
        async with agent.run_stream(question) as result:
            return await result.get_output()

    entry = asyncio.run(run())
    assert isinstance(entry, Entry)
    if kind is NativeOutput:
        assert entry == Entry(city="Oslo", number=42)


def get_time(city: str) -> str:
    """Tell the time in a city."""
    return {"Oslo": "14:05", "Lima": "08:05"}[city]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.mark.parametrize(
    ("question", "call", "result", "answer"),
    [
        (
            "What time is it in Oslo?",
            ("get_time", {"city": "Oslo"}),
            "14:05",
            "It is 14:05 in Oslo.",
        ),
        ("What is 250 + 117?", ("add", {"a": 250, "b": 117}), 367, "250 + 117 = 367"),
    ],
    ids=["get_time", "add"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_calls_a_tool_and_answers_with_its_result(
    model: Model, question: str, call: Any, result: Any, answer: str, stream: bool
) -> None:
    agent = Agent(model, tools=[get_time, add])

    async def run() -> tuple[str, list[Any]]:
        if not stream:
            whole = await agent.run(question)
            return whole.output, whole.all_messages()
        async with agent.run_stream(question) as streamed:
            return await streamed.get_output(), streamed.all_messages()

    output, messages = asyncio.run(run())
    assert output == answer
    parts = [part for message in messages for part in message.parts]
    (called,) = [part for part in parts if isinstance(part, ToolCallPart)]
    assert (called.tool_name, called.args_as_dict()) == call
    (returned,) = [part for part in parts if isinstance(part, ToolReturnPart)]
    assert returned.content == result
    assert returned.tool_call_id == called.tool_call_id


def test_an_agent_that_wants_a_typed_result_may_call_its_tools(model: Model) -> None:
    """The demo model cannot turn a time into an Entry, so the run ends at its second request."""
    agent: Agent[None, Entry] = Agent(model, output_type=NativeOutput(Entry), tools=[get_time, add])

    async def run() -> tuple[list[Any], Entry]:
        limits = UsageLimits(request_limit=1)
        with capture_run_messages() as messages, pytest.raises(UsageLimitExceeded):
            await agent.run("What time is it in Oslo?", usage_limits=limits)
        entry = (await agent.run("Answer in JSON: city is Oslo, number is 42")).output
        return [part for message in messages for part in message.parts], entry

    parts, entry = asyncio.run(run())
    assert [part.content for part in parts if isinstance(part, ToolReturnPart)] == ["14:05"]
    assert entry == Entry(city="Oslo", number=42)
