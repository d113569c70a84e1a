"""The synchronous openai client against the real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.support.questions import ANSWERS, COUNT, ask
from tests.support.recording import Recorder
from tests.support.server_process import ServerProcess, wait_until


def text_of(completion: ChatCompletion) -> str:
    (choice,) = completion.choices
    assert choice.message.content is not None
    return choice.message.content


@pytest.mark.parametrize("question", ANSWERS)
def test_a_question_is_answered_whole_and_streamed(client: openai.OpenAI, question: str) -> None:
    whole = client.chat.completions.create(**ask(question))
    assert text_of(whole) == ANSWERS[question]
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**ask(question), stream=True))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWERS[question]
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    request = ask("My name is Ana.")
    answer = client.chat.completions.create(**request).choices[0].message
    question = {"role": "user", "content": "What is my name?"}
    messages: list[Any] = [*request["messages"], answer, question]
    completion = client.chat.completions.create(model="demo", messages=messages, max_tokens=50)
    assert "Ana" in text_of(completion)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens


def test_the_last_chunk_has_the_usage_of_the_whole_reply(client: openai.OpenAI) -> None:
    client.chat.completions.create(**ask(COUNT))
    whole = client.chat.completions.create(**ask(COUNT))
    *chunks, last = client.chat.completions.create(
        **ask(COUNT), stream=True, stream_options={"include_usage": True}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_the_four_forms_of_a_prompt_are_completed_alike(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    texts = ["Once upon a time", "The capital of Norway"]
    reply = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json() for text in texts]
    ids: list[list[int]] = [answer["tokens"] for answer in reply]
    expected = []
    for text, tokens in zip(texts, ids, strict=True):
        of_text = client.completions.create(model="demo", prompt=text, max_tokens=12)
        of_ids = client.completions.create(model="demo", prompt=tokens, max_tokens=12)
        assert of_text.choices == of_ids.choices
        assert of_text.usage is not None
        assert of_text.usage.prompt_tokens == len(tokens)
        expected.append(of_text.choices[0].text)
    for prompt in (texts, ids):
        both = client.completions.create(model="demo", prompt=prompt, max_tokens=12)
        assert [choice.text for choice in both.choices] == expected
        assert [choice.index for choice in both.choices] == [0, 1]


def test_a_streamed_completion_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "prompt": ["Once", "Twice"], "max_tokens": 20}
    whole = client.completions.create(**request, n=2, seed=5, temperature=1.0)
    texts = [""] * 4
    for chunk in client.completions.create(**request, n=2, seed=5, temperature=1.0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_choices_differ_and_a_seed_gives_them_again(client: openai.OpenAI) -> None:
    request = ask("Tell me a story", n=4, temperature=1.8, max_tokens=20)
    first, again, other = (
        [choice.message.content for choice in completion.choices]
        for completion in (
            client.chat.completions.create(**request, seed=seed) for seed in (7, 7, 8)
        )
    )
    assert first == again
    assert first != other
    assert len(set(first)) > 1
    streamed = [""] * 4
    for chunk in client.chat.completions.create(**request, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_parts_of_text_and_a_system_message_are_read(client: openai.OpenAI) -> None:
    halves = [{"type": "text", "text": "Count from "}, {"type": "text", "text": "1 to 12."}]
    messages: list[Any] = [{"role": "user", "content": halves}]
    create = client.chat.completions.create
    whole = create(**ask(COUNT))
    parts = create(model="demo", messages=messages, max_tokens=100)
    assert parts.choices == whole.choices
    assert parts.usage is not None
    assert whole.usage is not None
    assert parts.usage.prompt_tokens == whole.usage.prompt_tokens
    system: list[Any] = [{"role": "system", "content": "You are brief."}, *messages]
    longer = create(model="demo", messages=system, max_tokens=1).usage
    assert longer is not None
    assert longer.prompt_tokens > whole.usage.prompt_tokens


@pytest.mark.parametrize("stop", [" 5", ["9", " 5 6"]])
def test_the_text_ends_before_a_stop_string(client: openai.OpenAI, stop: Any) -> None:
    completion = client.chat.completions.create(**ask(COUNT, stop=stop))
    assert text_of(completion) == "1 2 3 4"
    choice = completion.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.model_extra == {"stop_reason": stop if isinstance(stop, str) else stop[1]}
    chunks = client.chat.completions.create(**ask(COUNT, stop=stop), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "1 2 3 4"


def test_max_tokens_says_length(client: openai.OpenAI) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        request = ask(COUNT)
        del request["max_tokens"]
        completion = client.chat.completions.create(**request, **{field: 3})
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 3


def test_timings_come_when_they_are_asked_for(client: openai.OpenAI) -> None:
    extra = {"extra_body": {"timings": True}}
    completion = client.chat.completions.create(**ask(COUNT), **extra)
    chunks = list(client.chat.completions.create(**ask(COUNT), **extra, stream=True))
    for timings in (completion.model_extra, chunks[-1].model_extra):
        assert timings is not None
        assert timings["timings"]["total_ms"] > 0


def test_the_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "demo"
    assert client.models.retrieve("demo") == model


def test_headers_have_the_request_id_and_its_times(client: openai.OpenAI) -> None:
    response = client.chat.completions.with_raw_response.create(
        **ask(COUNT), extra_headers={"X-Request-Id": "order-66"}
    )
    assert response.headers["x-request-id"] == response.request_id == "order-66"
    names = [part.partition(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert names == ["queue", "prefill", "decode", "total", "cached"]
    completion = response.parse()
    assert completion.id == "chatcmpl-order-66"
    assert completion._request_id == "order-66"
    with client.chat.completions.with_streaming_response.create(
        **ask(COUNT), stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["x-request-id"]
        assert "queue;dur=" in streamed.headers["server-timing"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": 5000}, None, "context_length_exceeded"),
        ({"n": 1000}, "n", None),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "messages.0.role", None),
        ({"response_format": {"type": "yaml"}}, "response_format.type", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_names_the_field(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str | None, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(ask("Hi") | fields), stream=stream)
    error = caught.value
    assert (error.status_code, error.type) == (400, "invalid_request_error")
    assert error.code == code
    if param is not None:
        assert error.param == param
    assert isinstance(error.body, dict)
    assert error.body["message"] in error.message
    assert error.request_id


def test_an_unknown_model_is_not_found_and_the_served_one_is_named(client: openai.OpenAI) -> None:
    calls: list[Any] = [
        lambda: client.chat.completions.create(**(ask("Hi") | {"model": "gpt-9"})),
        lambda: client.completions.create(model="gpt-9", prompt="Hi"),
        lambda: client.models.retrieve("gpt-9"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError, match=r"'gpt-9'.*served: 'demo'") as caught:
            call()
        assert caught.value.code == "model_not_found"


def test_a_full_server_is_tried_again_as_often_as_the_client_says(
    client: openai.OpenAI, recorder: Recorder, server: ServerProcess
) -> None:
    extra = {"ignore_eos": True}
    full = client.chat.completions.create(
        **ask(COUNT, n=64, max_tokens=3000), stream=True, extra_body=extra
    )
    with full, ThreadPoolExecutor() as pool:
        next(iter(full))
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ask(COUNT))
        assert (caught.value.status_code, caught.value.code) == (503, "server_overloaded")
        assert caught.value.response.headers["retry-after"]
        patient = client.with_options(max_retries=5)
        answer = pool.submit(lambda: patient.chat.completions.create(**ask(COUNT)))
        wait_until(lambda: len(recorder.exchanges) >= 3)
        full.close()
        assert text_of(answer.result()) == ANSWERS[COUNT]
    assert {exchange.status for exchange in recorder.exchanges[1:-1]} == {503}


def test_an_aborted_request_is_not_tried_again(
    client: openai.OpenAI, recorder: Recorder, server: ServerProcess
) -> None:
    request = ask(COUNT, max_tokens=3000)
    extra = {"extra_body": {"ignore_eos": True}, "extra_headers": {"X-Request-Id": "long"}}
    with ThreadPoolExecutor() as pool:
        patient = client.with_options(max_retries=5)
        answer = pool.submit(lambda: patient.chat.completions.create(**request, **extra))
        abort = {"url": f"{server.url}/abort_request", "json": {"rid": "long"}}
        wait_until(lambda: httpx.post(**abort).status_code == 200)
        with pytest.raises(openai.InternalServerError) as caught:
            answer.result()
    assert caught.value.code == "request_aborted"
    assert len(recorder.exchanges) == 1
