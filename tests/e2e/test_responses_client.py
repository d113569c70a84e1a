"""The Responses API of the openai client against the real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel, Field

from demo_model.tools import add_tool, get_time_tool
from tests.support.questions import ANSWERS, COUNT

TOOLS: list[Any] = [
    {"type": "function", "strict": False, **tool["function"]}
    for tool in (get_time_tool(), add_tool())
]
Ask = Callable[..., Response]


class Entry(BaseModel):
    city: Literal["Oslo", "Rome", "Lima"]
    number: int = Field(ge=0, le=999)


def whole(client: openai.OpenAI, given: Any, **fields: Any) -> Response:
    return client.responses.create(model="demo", input=given, max_output_tokens=100, **fields)


def streamed(client: openai.OpenAI, given: Any, **fields: Any) -> Response:
    with client.responses.stream(
        model="demo", input=given, max_output_tokens=100, **fields
    ) as stream:
        return stream.get_final_response()


@pytest.fixture(params=[whole, streamed], ids=["whole", "streamed"])
def send(request: pytest.FixtureRequest) -> Ask:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("question", ANSWERS)
def test_a_question_is_answered(client: openai.OpenAI, send: Ask, question: str) -> None:
    response = send(client, question)
    assert response.output_text == ANSWERS[question]
    assert response.status == "completed"
    completion = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": question}], max_tokens=100
    )
    assert completion.usage is not None
    assert response.usage is not None
    assert response.usage.input_tokens == completion.usage.prompt_tokens
    assert response.usage.output_tokens == completion.usage.completion_tokens


def test_the_deltas_join_to_the_text(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="demo", input=COUNT, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWERS[COUNT]
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == list(range(len(events)))


def test_a_reply_that_was_cut_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="demo", input=COUNT, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_tool_is_called_and_its_result_answered(client: openai.OpenAI, send: Ask) -> None:
    items: list[Any] = [{"role": "user", "content": "What time is it in Oslo?"}]
    response = send(client, items, tools=TOOLS)
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_time", {"city": "Oslo"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "14:05"}
    items += [*(item.model_dump(exclude_unset=True) for item in response.output), output]
    for item in items:
        item.pop("parsed_arguments", None)  # added by the stream helper
    assert send(client, items, tools=TOOLS).output_text == "It is 14:05 in Oslo."


def test_parse_gives_an_object(client: openai.OpenAI) -> None:
    question = "Answer in JSON: city is Oslo, number is 42"
    response = client.responses.parse(model="demo", input=question, text_format=Entry)
    assert response.output_parsed == Entry(city="Oslo", number=42)


def test_a_bad_request_names_the_field(client: openai.OpenAI, send: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        send(client, "Hi", temperature=5)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="served: 'demo'"):
        client.responses.create(model="gpt-9", input="Hi")
