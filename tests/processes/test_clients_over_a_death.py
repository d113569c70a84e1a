"""The official packages see one unbroken stream over a death, or raise with --no-resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.support.server_process import ServerProcess, running

NUM_TOKENS = 150
CHAT: dict[str, Any] = {
    "model": "any",
    "max_tokens": NUM_TOKENS,
    "messages": [{"role": "user", "content": "go on"}],
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def server(model_dir: Path, socket_dir: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    arguments = ("--model", str(model_dir), "--served-model-name", "any", *request.param)
    with running(*arguments, tmp_dir=socket_dir, step_s=0.02) as server:
        yield server


def openai_client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def next_text(stream: openai.Stream[Any]) -> str:
    """The first text of a stream; the rest is left unread."""
    parts = (chunk.choices[0].delta.content for chunk in stream)
    return str(next(part for part in parts if part))


def anthropic_client(server: ServerProcess) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


@pytest.mark.parametrize("server", [()], indirect=True)
def test_the_openai_package_sees_one_stream(server: ServerProcess) -> None:
    client = openai_client(server)
    whole: Any = client.chat.completions.create(**CHAT)
    usage: Any = {"include_usage": True}
    stream: Any = client.chat.completions.create(**CHAT, stream=True, stream_options=usage)
    text, finishes, last = next_text(stream), [], None
    server.child("scheduler").kill()
    for last in stream:
        text += "".join(choice.delta.content or "" for choice in last.choices)
        finishes += [choice.finish_reason for choice in last.choices if choice.finish_reason]
    assert text == whole.choices[0].message.content
    assert finishes == [whole.choices[0].finish_reason] == ["length"]
    assert last is not None
    assert last.usage == whole.usage
    assert "it is started again" in server.output


@pytest.mark.parametrize("server", [()], indirect=True)
def test_the_anthropic_package_sees_one_stream(server: ServerProcess) -> None:
    client = anthropic_client(server)
    whole = client.messages.create(**CHAT)
    with client.messages.stream(**CHAT) as stream:
        text = next(stream.text_stream)
        server.child("scheduler").kill()
        text += "".join(stream.text_stream)
        message = stream.get_final_message()
    (block,), (expected,) = message.content, whole.content
    assert block.type == expected.type == "text"
    assert text == block.text == expected.text
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens == NUM_TOKENS
    assert "it is started again" in server.output


@pytest.mark.parametrize("server", [("--no-resume",)], indirect=True)
def test_without_resuming_the_openai_package_raises(server: ServerProcess) -> None:
    stream = openai_client(server).chat.completions.create(**CHAT, stream=True)
    assert next_text(stream)
    server.child("scheduler").kill()
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "engine_restarted"


@pytest.mark.parametrize("server", [("--no-resume",)], indirect=True)
def test_without_resuming_the_anthropic_package_raises(server: ServerProcess) -> None:
    with anthropic_client(server).messages.stream(**CHAT) as stream:
        next(stream.text_stream)
        server.child("scheduler").kill()
        with pytest.raises(anthropic.APIStatusError, match="scheduler process has died"):
            for _ in stream.text_stream:
                pass
