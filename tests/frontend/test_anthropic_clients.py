"""Clients of Anthropic's API on /v1/messages: the package's helpers, and an agent."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider

from tests.support.anthropic_bodies import HI, TIME
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'


@pytest.fixture(scope="module")
def hermes() -> Iterator[HttpServer]:
    backend = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=backend) as running:
        yield running


@pytest.fixture
def client(hermes: HttpServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=hermes.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_tool_loop_of_the_client_goes_back_through_the_template(
    client: Anthropic, hermes: HttpServer
) -> None:
    hermes.backend.text = f"<think>\nhm\n</think>\n\nWait.\n{CALL}"  # type: ignore[attr-defined]
    fields: Any = {"model": "org/tiny", "max_tokens": 100, "tools": [TIME]}
    asked = client.messages.create(messages=HI, **fields)
    (call,) = [block for block in asked.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "12:00"}
    turns = [
        *HI,
        {"role": "assistant", "content": asked.content},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    hermes.backend.text = "Noon."  # type: ignore[attr-defined]
    (text,) = client.messages.create(messages=turns, **fields).content  # type: ignore[arg-type]
    assert text.type == "text"
    assert text.text == "Noon."
    assert hermes.backend.prompts[-1].endswith(  # type: ignore[attr-defined]
        '<|user|>hi<|assistant|><think>hm</think>Wait. CALL get_time {"zone": "UTC"}'
        "<|tool|>12:00<|user|>So?<|assistant|>"
    )


def test_the_tool_runner_of_the_client_gives_up_threads_and_runs(
    client: Anthropic, hermes: HttpServer
) -> None:
    def get_time(zone: str) -> str:
        """Tell the time."""
        hermes.backend.text = f"Noon in {zone}."  # type: ignore[attr-defined]
        return "12:00"

    hermes.backend.text = CALL  # type: ignore[attr-defined]
    runner = client.beta.messages.tool_runner(
        model="org/tiny", max_tokens=300, tools=[beta_tool(get_time)], messages=HI
    )
    (block,) = runner.until_done().content
    assert block.type == "text"
    assert block.text == "Noon in UTC."


class Sum(BaseModel):
    a: int


def test_an_agent_of_pydantic_ai_calls_its_tool_and_gives_a_typed_result(
    hermes: HttpServer,
) -> None:
    provider = AnthropicProvider(api_key="none", base_url=hermes.url)
    model = AnthropicModel("org/tiny", provider=provider)
    agent = Agent(model, output_type=ToolOutput(Sum))

    @agent.tool_plain
    def get_time(zone: str) -> str:
        arguments = '{"name": "final_result", "arguments": {"a": 4}}'
        hermes.backend.text = f"<tool_call>\n{arguments}\n</tool_call>"  # type: ignore[attr-defined]
        return "12:00"

    hermes.backend.text = f"<think>hm</think>{CALL}"  # type: ignore[attr-defined]
    assert asyncio.run(agent.run("hi")).output == Sum(a=4)
    assert hermes.backend.prompts[-1].endswith(  # type: ignore[attr-defined]
        '<think>hm</think> CALL get_time {"zone": "UTC"}<|tool|>12:00<|assistant|>'
    )


def test_the_client_parses_an_output_format(client: Anthropic, hermes: HttpServer) -> None:
    hermes.backend.text = '{"a": 3}'  # type: ignore[attr-defined]
    message = client.messages.parse(
        model="org/tiny", max_tokens=100, messages=HI, output_format=Sum
    )
    assert message.parsed_output == Sum(a=3)
    assert hermes.backend.grammars[-1] is not None  # type: ignore[attr-defined]


def test_the_async_client_streams(hermes: HttpServer) -> None:
    async def text() -> str:
        async with AsyncAnthropic(base_url=hermes.url, api_key="none", max_retries=0) as client:
            stream = client.messages.stream(model="org/tiny", max_tokens=100, messages=HI)
            async with stream as opened:
                return "".join([piece async for piece in opened.text_stream])

    hermes.backend.text = "Hello \U0001f600"  # type: ignore[attr-defined]
    assert asyncio.run(text()) == "Hello \U0001f600"
