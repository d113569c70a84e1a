"""Reasoning through the openai client: the demo model with a template that opens a `<think>` tag.

The model has not learned to close the tag, so its whole reply is reasoning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from demo_model.tokenizer import CHAT_TEMPLATE
from tests.e2e.conftest import ARGUMENTS
from tests.support.questions import ANSWERS, COUNT, ask
from tests.support.server_process import running

OPENS_REASONING = "{%- if add_generation_prompt and enable_thinking -%}<think>{%- endif -%}"
THINKING: Any = {"extra_body": {"enable_thinking": True}, "max_tokens": 40}


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(CHAT_TEMPLATE + OPENS_REASONING + "{# ends with </think> #}")
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    arguments = (*ARGUMENTS, "--chat-template", str(template))
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield f"{server.url}/v1"


def test_reasoning_is_separate_from_the_content_whole_and_streamed(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**ask(COUNT, **THINKING))
    message = completion.choices[0].message
    assert message.content is None
    assert message.model_extra is not None
    reasoning = message.model_extra["reasoning_content"]
    assert reasoning
    *chunks, last = client.chat.completions.create(
        **ask(COUNT, **THINKING), stream=True, stream_options={"include_usage": True}
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert not any(delta.content for delta in deltas)
    parts = [(delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas]
    assert "".join(parts) == reasoning
    for usage in (completion.usage, last.usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens


def test_the_stream_helper_keeps_the_reasoning(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**ask(COUNT, **THINKING))
    with client.chat.completions.stream(**ask(COUNT, **THINKING)) as stream:
        *_, last = [event.snapshot for event in stream if event.type == "chunk"]
    assert last.choices[0].message.content in (None, "")
    assert last.choices[0].message.model_extra == completion.choices[0].message.model_extra


def test_effort_none_turns_thinking_off(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**ask(COUNT, reasoning_effort="none"))
    assert completion.choices[0].message.content == ANSWERS[COUNT]
    assert not completion.choices[0].message.model_extra
