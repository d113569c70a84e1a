"""/v1/messages over all real processes with the demo model, by the `anthropic` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from tests.support.server_process import running

# Bounded, so that a call that is forced on the model comes to an end.
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
ADD: Any = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": NUMBER, "b": NUMBER},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
CALL: Any = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[anthropic.Anthropic]:
    arguments = ("--model", "demo", "--num-threads", "1", "--kv-memory", "64MiB")
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with (
        running(*arguments, "--api-key", "secret", tmp_dir=tmp_dir, hash_engine=False) as server,
        anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as made,
    ):
        yield made


def question(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    greedy = {"extra_body": {"temperature": 0}}
    return {"model": "demo", "max_tokens": 200, "messages": messages, **greedy, **fields}


def test_text_is_the_same_whole_and_streamed(client: anthropic.Anthropic) -> None:
    body = question("Hi! What can you do?")
    message = client.messages.create(**body)
    Message.model_validate_json(message.to_json(), strict=True)
    (block,) = message.content
    assert block.type == "text"
    assert "greet" in block.text
    assert message.stop_reason == "end_turn"
    with client.messages.stream(**body) as stream:
        assert "".join(stream.text_stream) == block.text
        usage = stream.get_final_message().usage
    assert usage.output_tokens == message.usage.output_tokens > 5


def test_the_parts_of_the_input_add_up_to_the_count(client: anthropic.Anthropic) -> None:
    words = "Say it again: " + "one two three four five six seven eight nine ten " * 5
    body = question(words, system="You are brief.")
    prompt = {name: body[name] for name in ("model", "messages", "system")}
    counted = client.messages.count_tokens(**prompt).input_tokens
    for again in (False, True):
        usage = client.messages.create(**{**body, "max_tokens": 4}).usage
        assert usage.cache_read_input_tokens is not None
        assert (usage.cache_read_input_tokens > 0) == again
        assert usage.input_tokens + usage.cache_read_input_tokens == counted


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(
    client: anthropic.Anthropic, stream: bool
) -> None:
    body = question("What is 3 + 4?", tools=[ADD], tool_choice=CALL)
    if stream:
        with client.messages.stream(**body) as events:
            message: Any = events.get_final_message()
    else:
        message = client.messages.create(**body)
    (call,) = message.content
    assert (call.type, call.name, message.stop_reason) == ("tool_use", "add", "tool_use")
    assert call.input.keys() == {"a", "b"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "7"}
    turns = [
        *body["messages"],
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**question("", tools=[ADD], messages=turns, max_tokens=20))
    assert answer.usage.output_tokens > 0
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_an_output_format_is_followed(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": NUMBER}, "required": ["a"]}
    schema["additionalProperties"] = False
    format = {"type": "json_schema", "schema": schema}
    message = client.messages.create(**question("Hello", output_config={"format": format}))
    (block,) = message.content
    assert block.type == "text"
    assert block.text.replace(" ", "").startswith('{"a":')
    assert message.stop_reason == "end_turn"


def test_errors_are_those_of_the_package(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="other").messages.create(**question("Hello"))
    for text, max_tokens, words in (
        ("Hello " * 5000, 9, r"prompt is too long: \d+ tokens > 4095 maximum"),
        ("Hello " * 500_000, 9, r"prompt is too long: .* characters"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=words):
            client.messages.create(**question(text, max_tokens=max_tokens))
