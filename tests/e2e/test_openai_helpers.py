"""The openai client's stream helper and `parse`, with pydantic models as formats and as tools."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel, Field

from tests.support.questions import ANSWERS, COUNT, ask


class Entry(BaseModel):
    """An entry of a list; bounded, so that the text ends whatever the model would write."""

    city: Literal["Oslo", "Rome", "Lima"]
    number: int = Field(ge=0, le=999)
    tags: list[Literal["old", "new"]] = Field(max_length=2)


class GetTime(BaseModel):
    """Tell the time in a city."""

    city: Literal["Oslo", "Rome", "Lima"]


class Add(BaseModel):
    """Add two numbers."""

    a: int = Field(ge=0, le=999)
    b: int = Field(ge=0, le=999)


TOOLS = [pydantic_function_tool(GetTime), pydantic_function_tool(Add)]
CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "Add"}}]
JSON_QUESTION = "Answer in JSON: city is Oslo, number is 42"


def test_the_stream_helper_gives_deltas_and_the_final_completion(client: openai.OpenAI) -> None:
    text, types = "", []
    with client.chat.completions.stream(
        **ask(COUNT), stream_options={"include_usage": True}
    ) as stream:
        for event in stream:
            types.append(event.type)
            if event.type == "content.delta":
                text += event.delta
                assert event.snapshot == text
            elif event.type == "content.done":
                assert event.content == text
        final = stream.get_final_completion()
    assert text == ANSWERS[COUNT] == final.choices[0].message.content
    assert types.count("content.done") == 1
    assert final.choices[0].finish_reason == "stop"
    whole = client.chat.completions.create(**ask(COUNT))
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_helper_and_parse_give_the_same_object(client: openai.OpenAI) -> None:
    request = ask(JSON_QUESTION, temperature=1.0, seed=3, response_format=Entry)
    with client.chat.completions.stream(**request) as stream:
        done = [event for event in stream if event.type == "content.done"]
        final = stream.get_final_completion()
    whole = client.chat.completions.parse(**request)
    parsed = whole.choices[0].message.parsed
    assert isinstance(parsed, Entry)
    assert final.choices[0].message.parsed == parsed
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert [event.parsed for event in done] == [parsed]


def test_parse_gives_an_object_for_each_choice(client: openai.OpenAI) -> None:
    request = ask(JSON_QUESTION, temperature=1.5, seed=1, n=4)
    completion = client.chat.completions.parse(**request, response_format=Entry)
    assert [type(choice.message.parsed) for choice in completion.choices] == [Entry] * 4


def test_parse_says_when_the_text_was_cut(client: openai.OpenAI) -> None:
    request = ask(JSON_QUESTION, max_tokens=5, response_format=Entry)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**request)


@pytest.mark.parametrize("tool_choice", CHOICES, ids=["required", "named"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_parse_gives_the_arguments_of_a_call_that_must_be_made(
    client: openai.OpenAI, tool_choice: Any, temperature: float
) -> None:
    request = ask(
        "What is 12 + 30?",
        tools=TOOLS,
        tool_choice=tool_choice,
        parallel_tool_calls=False,
        temperature=temperature,
        seed=2,
    )
    completion = client.chat.completions.parse(**request)
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    allowed = (Add,) if isinstance(tool_choice, dict) else (Add, GetTime)
    assert isinstance(call.function.parsed_arguments, allowed)
    with client.chat.completions.stream(**request) as stream:
        events = [event for event in stream if event.type.startswith("tool_calls.")]
        final = stream.get_final_completion()
    assert events[-1].type == "tool_calls.function.arguments.done"
    assert events[-1].parsed_arguments == call.function.parsed_arguments
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function == call.function
