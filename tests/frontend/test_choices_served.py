"""128 choices over HTTP, with the real engine behind: read whole, streamed, and left in between."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from minisrv.llm import LLM
from tests.support.engine_backend import EngineBackend
from tests.support.http_server import HttpServer, serve

N = 128
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_pages": 600, "page_size": 16}
BODY: dict[str, Any] = {
    "model": "org/tiny",
    "messages": [{"role": "user", "content": "Tell me a story. " * 40}],
    "n": N,
    "seed": 6,
    "temperature": 2.0,
    "top_p": 1.0,
    "extra_body": {"top_k": 0, "ignore_eos": True},
    "max_tokens": 6,
}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with (
        LLM("demo", **OPTIONS) as llm,
        serve(make_backend=functools.partial(EngineBackend, llm=llm)) as running,
    ):
        yield running


def is_idle_and_whole(server: HttpServer) -> bool:
    def look() -> bool:
        loop = server.backend.llm._loop  # type: ignore[attr-defined]
        if loop.busy:
            return False
        loop.scheduler.check()
        cache = loop.scheduler.cache
        return bool(cache.num_available == cache.pages.size and cache.rows.num_free == N * 2)

    return server.in_loop(look)


def test_the_choices_of_a_stream_are_those_of_the_whole_and_count_one_prompt(
    server: HttpServer,
) -> None:
    create: Any = server.openai.chat.completions.create
    completion = create(**BODY)
    whole = [(choice.index, choice.message.content) for choice in completion.choices]
    assert [index for index, _ in whole] == list(range(N))
    assert len({text for _, text in whole}) > 8
    (alone,) = create(**{**BODY, "n": 1}).choices
    assert alone.message.content == whole[0][1]
    usage = completion.usage
    assert usage.completion_tokens <= 6 * N
    assert 200 < usage.prompt_tokens < 1000
    state = ChatCompletionStreamState()
    for chunk in create(**BODY, stream=True, stream_options={"include_usage": True}):
        state.handle_chunk(chunk)
    merged = state.current_completion_snapshot
    assert [(choice.index, choice.message.content) for choice in merged.choices] == whole
    assert merged.usage.prompt_tokens == usage.prompt_tokens
    assert merged.usage.completion_tokens == usage.completion_tokens


@pytest.mark.parametrize("num_chunks", [1, N + 1, 3 * N])
def test_a_client_that_leaves_takes_all_its_choices_along(
    server: HttpServer, num_chunks: int
) -> None:
    before = server.openai.chat.completions.create(**{**BODY, "n": 2, "max_tokens": 3})
    stream: Any = server.openai.chat.completions.create(**{**BODY, "max_tokens": 400}, stream=True)
    for _ in range(num_chunks):
        next(stream)
    stream.close()
    server.wait_until(lambda: server.registry.num_open == 0)
    assert is_idle_and_whole(server)
    after = server.openai.chat.completions.create(**{**BODY, "n": 2, "max_tokens": 3})
    assert [c.message.content for c in after.choices] == [c.message.content for c in before.choices]
