"""Tools and thoughts over all real processes, with the demo model and a template for tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from demo_model.tokenizer import CHAT_TEMPLATE
from demo_model.tools import add_tool, get_time_tool
from tests.support.server_process import ServerProcess, running

TOOLS: Any = [get_time_tool(), add_tool()]
# Bounded, so that a call that is forced on the model comes to an end.
PARAMETERS = TOOLS[1]["function"]["parameters"]
PARAMETERS["additionalProperties"] = False
for schema in PARAMETERS["properties"].values():
    schema |= {"minimum": 0, "maximum": 999}
OPENS_A_THOUGHT = "{%- if add_generation_prompt and enable_thinking -%}<think>{%- endif -%}"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(CHAT_TEMPLATE + OPENS_A_THOUGHT + "{# ends with </think> #}")
    arguments = ("--model", "demo", "--chat-template", str(template), "--num-threads", "1")
    arguments += ("--kv-memory", "64MiB")
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        assert isinstance(server, ServerProcess)
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="demo", messages=messages, **fields)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "add"}}
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        messages: Any = [{"role": "user", "content": "What is 3 + 4?"}]
        with client.chat.completions.stream(model="demo", messages=messages, **fields) as events:
            completion: Any = events.get_final_completion()
    else:
        completion = ask(client, "What is 3 + 4?", **fields)
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"a", "b"}
    assert all(value in range(1000) for value in arguments.values())
    assert completion.choices[0].finish_reason == "tool_calls"


def test_a_required_call_is_of_one_of_the_tools(client: openai.OpenAI) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "max_tokens": 400}
    for seed in range(5):
        choice = ask(client, "Hello", seed=seed, **fields).choices[0]
        for call in choice.message.tool_calls or []:
            assert call.function.name in ("add", "get_time")
            if choice.finish_reason == "tool_calls":
                assert isinstance(json.loads(call.function.arguments), dict)
        assert choice.message.content is None or choice.finish_reason == "length"


def test_a_thought_that_the_prompt_opens_is_all_of_an_unclosed_reply(client: openai.OpenAI) -> None:
    completion = ask(client, "Hello", extra_body={"enable_thinking": True})
    message = completion.choices[0].message
    assert message.content is None
    assert message.reasoning_content
    usage = completion.usage
    assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens
    assert ask(client, "Hello").choices[0].message.content


def test_a_grammar_waits_for_the_end_of_the_thought(client: openai.OpenAI) -> None:
    extra = {"enable_thinking": True, "regex": "yes|no"}
    message = ask(client, "Hello", extra_body=extra, max_tokens=5).choices[0].message
    assert message.content is None
    assert message.reasoning_content
    extra["enable_thinking"] = False
    assert ask(client, "Hello", extra_body=extra).choices[0].message.content in ("yes", "no")
