"""Agents of pydantic-ai on the real server."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from questions import ANSWERS, COUNT
from recording import Recorder

SETTINGS = ModelSettings(max_tokens=100, parallel_tool_calls=False)


class Entry(BaseModel):
    """An entry of a list; bounded, so that the text ends whatever the model would write."""

    city: Literal["Oslo", "Rome", "Lima"]
    number: int = Field(ge=0, le=999)


@pytest.fixture
def model(base_url: str, recorder: Recorder) -> OpenAIChatModel:
    provider = OpenAIProvider(base_url=base_url, http_client=recorder.async_client())
    return OpenAIChatModel("demo", provider=provider, settings=SETTINGS)


def test_an_agent_answers_with_text(model: OpenAIChatModel) -> None:
    result = asyncio.run(Agent(model).run(COUNT))
    assert result.output == ANSWERS[COUNT]
    assert result.usage.output_tokens > 0
    assert result.usage.requests == 1


def test_an_agent_streams_its_text(model: OpenAIChatModel) -> None:
    async def run() -> tuple[list[str], int]:
        async with Agent(model).run_stream(COUNT) as result:
            deltas = [delta async for delta in result.stream_text(delta=True, debounce_by=None)]
        return deltas, result.usage.output_tokens

    deltas, num_tokens = asyncio.run(run())
    assert len(deltas) > 5
    assert "".join(deltas) == ANSWERS[COUNT]
    assert num_tokens > 0


def test_an_agent_remembers_the_conversation(model: OpenAIChatModel) -> None:
    async def run() -> str:
        agent = Agent(model)
        first = await agent.run("My name is Ana.")
        second = await agent.run("What is my name?", message_history=first.all_messages())
        return second.output

    assert "Ana" in asyncio.run(run())


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_gives_a_typed_result(model: OpenAIChatModel, kind: Any, stream: bool) -> None:
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
