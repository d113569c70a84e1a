"""The whole tool loop: the model calls a tool, the client runs it, the model answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from demo_model.corpus import CITIES
from demo_model.tools import add_tool, get_time_tool

TOOLS: list[Any] = [get_time_tool(), add_tool()]
FUNCTIONS: dict[str, Callable[..., str]] = {
    "get_time": lambda city: f"{CITIES.index(city) + 4:02}:05",
    "add": lambda a, b: str(a + b),
}
Ask = Callable[[openai.OpenAI, list[Any]], ChatCompletion]


def whole(client: openai.OpenAI, messages: list[Any]) -> ChatCompletion:
    return client.chat.completions.create(
        model="demo", messages=messages, tools=TOOLS, max_tokens=100
    )


def streamed(client: openai.OpenAI, messages: list[Any]) -> ChatCompletion:
    with client.chat.completions.stream(
        model="demo", messages=messages, tools=TOOLS, max_tokens=100
    ) as stream:
        return stream.get_final_completion()


@pytest.fixture(params=[whole, streamed], ids=["whole", "streamed"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("question", "name", "arguments", "answer"),
    [
        ("What time is it in Oslo?", "get_time", {"city": "Oslo"}, "It is 04:05 in Oslo."),
        ("What is the time in Madrid?", "get_time", {"city": "Madrid"}, "It is 12:05 in Madrid."),
        ("What is 250 + 117?", "add", {"a": 250, "b": 117}, "250 + 117 = 367"),
        ("Add 612 and 130.", "add", {"a": 612, "b": 130}, "612 + 130 = 742"),
    ],
)
def test_a_question_becomes_a_call_and_its_result_an_answer(
    client: openai.OpenAI, ask: Ask, question: str, name: str, arguments: Any, answer: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": question}]
    (choice,) = ask(client, messages).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == name
    assert json.loads(call.function.arguments) == arguments
    result = FUNCTIONS[name](**arguments)
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    (choice,) = ask(client, messages).choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == answer
    assert choice.message.tool_calls is None


def test_a_loop_goes_on_to_the_next_question(client: openai.OpenAI, ask: Ask) -> None:
    messages: list[Any] = []
    for question, expected in [
        ("What is 250 + 117?", "250 + 117 = 367"),
        ("What time is it in Lima?", "It is 07:05 in Lima."),
    ]:
        messages.append({"role": "user", "content": question})
        while True:
            (choice,) = ask(client, messages).choices
            messages.append(choice.message)
            for call in choice.message.tool_calls or []:
                assert call.type == "function"
                result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            if choice.finish_reason == "stop":
                break
            assert len(messages) < 10
        assert choice.message.content == expected


def test_beside_a_response_format_a_tool_may_be_called(client: openai.OpenAI) -> None:
    properties = {"city": {"type": "string"}, "number": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": ["city", "number"]}
    json_schema: Any = {"name": "entry", "schema": {**schema, "additionalProperties": False}}
    finish_reasons = []
    for question in ("What time is it in Oslo?", "Answer in JSON: city is Oslo, number is 42"):
        completion = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            tools=TOOLS,
            response_format={"type": "json_schema", "json_schema": json_schema},
            max_tokens=100,
        )
        finish_reasons.append(completion.choices[0].finish_reason)
    assert finish_reasons == ["tool_calls", "stop"]
    assert json.loads(completion.choices[0].message.content or "") == {"city": "Oslo", "number": 42}


def test_a_question_that_needs_no_tool_is_answered_with_text(
    client: openai.OpenAI, ask: Ask
) -> None:
    (choice,) = ask(client, [{"role": "user", "content": "Spell river."}]).choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == "r-i-v-e-r"
    assert choice.message.tool_calls is None


def test_no_call_is_made_with_tool_choice_none(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is 17 + 25?"}],
        tools=TOOLS,
        tool_choice="none",
        max_tokens=100,
    )
    assert completion.choices[0].message.tool_calls is None
    assert (completion.choices[0].message.content or "").endswith("42")


def test_a_call_that_is_cut_off_says_length(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is 17 + 25?"}],
        tools=TOOLS,
        tool_choice="required",
        max_tokens=12,
    )
    assert completion.choices[0].finish_reason == "length"
