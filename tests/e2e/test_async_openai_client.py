"""AsyncOpenAI: many concurrent requests, and clients that disconnect."""

from __future__ import annotations

import asyncio
from itertools import cycle, islice
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.support.questions import ANSWERS, COUNT, ask
from tests.support.server_process import ServerProcess, wait_until


class Entry(BaseModel):
    city: Literal["Oslo", "Rome", "Lima"]
    number: int = Field(ge=0, le=999)


LONG = ask(COUNT, max_tokens=3000, extra_body={"ignore_eos": True})


def load_of(server: ServerProcess) -> dict[str, Any]:
    """Without the scheduler's figures before its first report."""
    (load,) = httpx.get(f"{server.url}/v1/loads").json()["loads"]
    return dict(load)


def is_free(server: ServerProcess) -> bool:
    load = load_of(server)
    numbers = (load["num_open_reqs"], load.get("num_running_reqs"), load.get("num_waiting_reqs"))
    return numbers == (0, 0, 0)


async def _until(server: ServerProcess, num_running: int) -> None:
    """Wait until the scheduler, which reports twice per second, reports `num_running` requests."""
    await asyncio.to_thread(
        wait_until, lambda: load_of(server).get("num_running_reqs") == num_running
    )


async def _streamed(client: openai.AsyncOpenAI, request: dict[str, Any]) -> str:
    stream = await client.chat.completions.create(**request, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def _whole(client: openai.AsyncOpenAI, request: dict[str, Any]) -> str:
    completion = await client.chat.completions.create(**request)
    return completion.choices[0].message.content or ""


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.soak), 1.5])
def test_32_concurrent_requests_get_the_texts_of_single_requests(
    client: openai.OpenAI, async_client: openai.AsyncOpenAI, temperature: float
) -> None:
    requests = [
        ask(question, temperature=temperature, seed=seed, max_tokens=40)
        for seed, question in enumerate(islice(cycle(ANSWERS), 32))
    ]
    single = [
        client.chat.completions.create(**request).choices[0].message.content for request in requests
    ]

    async def all_at_once() -> list[str]:
        async with async_client:
            return await asyncio.gather(
                *(
                    (_streamed if i % 2 else _whole)(async_client, request)
                    for i, request in enumerate(requests)
                )
            )

    assert asyncio.run(all_at_once()) == single
    if temperature == 0:
        assert single == list(islice(cycle(ANSWERS.values()), 32))


def test_streams_that_are_closed_free_their_requests(
    server: ServerProcess, async_client: openai.AsyncOpenAI
) -> None:
    async def leave() -> None:
        async with async_client:
            streams = [
                await async_client.chat.completions.create(**LONG, stream=True) for _ in range(8)
            ]
            for stream in streams:
                await anext(aiter(stream))
            await _until(server, 8)
            for stream in streams:
                await stream.close()
            await _until(server, 0)

    asyncio.run(leave())
    wait_until(lambda: is_free(server))


def test_tasks_that_are_cancelled_free_their_requests(
    server: ServerProcess, async_client: openai.AsyncOpenAI
) -> None:
    async def leave() -> None:
        async with async_client:
            ask_for = (_whole, _streamed, _whole, _streamed)
            tasks = [asyncio.create_task(way(async_client, LONG)) for way in ask_for]
            await _until(server, 4)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ended)
            await _until(server, 0)
            assert await _whole(async_client, ask(COUNT)) == ANSWERS[COUNT]

    asyncio.run(leave())
    wait_until(lambda: is_free(server))


def test_a_request_that_takes_too_long_for_its_client_is_freed(
    server: ServerProcess, async_client: openai.AsyncOpenAI
) -> None:
    async def give_up() -> None:
        async with async_client:
            with pytest.raises(openai.APITimeoutError):
                await async_client.chat.completions.create(**LONG, timeout=0.5)

    asyncio.run(give_up())
    wait_until(lambda: is_free(server))


def test_the_async_helpers_give_objects_of_a_pydantic_model(
    async_client: openai.AsyncOpenAI,
) -> None:
    question = ask("Answer in JSON: city is Oslo, number is 42", response_format=Entry)

    async def both() -> list[Any]:
        async with async_client:
            whole = await async_client.chat.completions.parse(**question)
            async with async_client.chat.completions.stream(**question, n=2) as stream:
                final = await stream.get_final_completion()
        return [choice.message.parsed for choice in (*whole.choices, *final.choices)]

    assert asyncio.run(both()) == [Entry(city="Oslo", number=42)] * 3
