"""/v1/responses over all real processes, with the demo model and the `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.responses import Response

from tests.support.server_process import running


class Answer(pydantic.BaseModel):
    answer: Literal["yes", "no"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    arguments = ("--model", "demo", "--num-threads", "1", "--kv-memory", "64MiB")
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, text: Any, **fields: Any) -> Response:
    response = client.responses.create(model="demo", input=text, temperature=0, **fields)
    assert isinstance(response, Response)
    return Response.model_validate_json(response.model_dump_json(exclude_unset=True), strict=True)


def test_a_conversation_goes_on_from_its_output(client: openai.OpenAI) -> None:
    first: Any = {"role": "user", "content": "My name is Ana."}
    response = ask(client, [first])
    assert response.output_text == "Nice to meet you, Ana!"
    assert response.status == "completed"
    said: Any = [item.model_dump(exclude_unset=True) for item in response.output]
    second: Any = {"role": "user", "content": "What is my name?"}
    answer = ask(client, [first, *said, second])
    assert answer.output_text == "Your name is Ana."
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens > 0
    chat: Any = [first, {"role": "assistant", "content": response.output_text}, second]
    completion = client.chat.completions.create(model="demo", messages=chat, temperature=0)
    assert completion.choices[0].message.content == answer.output_text
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == answer.usage.input_tokens


def test_a_stream_is_the_whole_response(client: openai.OpenAI) -> None:
    whole = ask(client, "What is 58 + 67?")
    with client.responses.stream(model="demo", input="What is 58 + 67?", temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    assert len(deltas) > 3
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_format_holds_the_text_to_its_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="demo", input="Is it?", text_format=Answer)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.answer in ("yes", "no")


def test_input_tokens_are_those_of_the_prompt(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(
        model="demo", input="Hello", instructions="Be brief."
    )
    usage = ask(client, "Hello", instructions="Be brief.").usage
    assert usage is not None
    assert counted.input_tokens == usage.input_tokens
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.input_tokens.count(model="demo", input="x" * 1_000_000)
    assert raised.value.param == "input"


def test_a_prompt_that_does_not_fit_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as raised:
        ask(client, "a " * 5000)
    assert (raised.value.param, raised.value.code) == ("input", "context_length_exceeded")
