"""Chat and completions over HTTP, read with the `openai` package and validated by its types."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from minisrv.errors import EngineDeadError, MinisrvError
from minisrv.frontend.apis.openai.fields import ROLES
from minisrv.frontend.generation.groups import CHOICES_AT_ONCE
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.tokenizer.tool_arguments import with_read_arguments
from tests.support.http_server import MODEL, HttpServer, serve
from tests.support.scripted_backend import TEXT, WORDS

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def stream_values(server: HttpServer, path: str, **body: Any) -> list[Any]:
    """The data of each event of a stream, checked to be nothing but data lines and one [DONE]."""
    response = server.http.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *events, last, rest = response.content.decode().split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def chat_chunks(server: HttpServer, **body: Any) -> Iterator[ChatCompletionChunk]:
    for value in stream_values(server, CHAT, messages=HI, **body):
        yield ChatCompletionChunk.model_validate(value, strict=True)


def test_a_chat_reply_fits_the_openai_type(server: HttpServer) -> None:
    response = server.chat(seed=1)
    completion = ChatCompletion.model_validate_json(response.content, strict=True)
    choice = completion.choices[0]
    assert choice.message.content == TEXT
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert completion.id == f"chatcmpl-{response.headers['x-request-id']}"
    assert completion.model == MODEL.name
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 7, 14)
    assert usage.prompt_tokens_details.cached_tokens == 3
    raw = response.json()
    assert {"id", "object", "created", "model", "choices"} <= raw.keys()
    assert {"index", "message", "finish_reason", "logprobs"} <= raw["choices"][0].keys()
    assert raw["choices"][0]["message"].keys() == {"role", "content", "refusal"}


def test_the_openai_client_reads_a_chat_and_a_stream(server: HttpServer) -> None:
    whole = server.openai.chat.completions.create(model=MODEL.name, messages=HI, max_tokens=3)
    assert whole.choices[0].message.content == "".join(WORDS[:3])
    assert whole.choices[0].finish_reason == "length"
    stream = server.openai.chat.completions.create(model=MODEL.name, messages=HI, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT


def test_a_chat_stream_has_role_text_finish_in_this_order(server: HttpServer) -> None:
    chunks = list(chat_chunks(server))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert all(chunk.choices[0].delta.content for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.model_dump(exclude_unset=True) == {}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_include_usage_adds_one_chunk_and_a_null_to_the_others(server: HttpServer) -> None:
    *chunks, last = chat_chunks(server, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 7)
    assert all(c.usage is None and "usage" in c.model_fields_set for c in chunks)


def test_continuous_usage_counts_up_in_every_chunk(server: HttpServer) -> None:
    chunks = list(chat_chunks(server, stream_options={"continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 7


def test_n_choices_are_interleaved_and_the_prompt_is_counted_once(server: HttpServer) -> None:
    whole = ChatCompletion.model_validate_json(server.chat(n=3).content, strict=True)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {TEXT}
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 21)
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat_chunks(server, n=3):
        assert len(chunk.choices) == 1
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {TEXT}


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ("", 1)],
)
def test_each_form_of_prompt_is_completed(
    server: HttpServer, prompt: Any, num_prompts: int
) -> None:
    response = server.http.post(COMPLETIONS, json={"prompt": prompt, "n": 2})
    completion = Completion.model_validate_json(response.content, strict=True)
    assert [choice.index for choice in completion.choices] == list(range(num_prompts * 2))
    assert {choice.text for choice in completion.choices} == {TEXT}
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 7 * num_prompts
    sent = server.backend.requests[-num_prompts:]
    plain = [m.prompt if isinstance(m.prompt, str) else m.prompt.tolist() for m in sent]
    assert plain == (prompt if num_prompts > 1 else [prompt])
    assert [message.uid - sent[0].uid for message in sent] == [2 * i for i in range(num_prompts)]
    assert all(message.sampling.max_tokens == 16 for message in sent)


def test_a_completion_stream_fits_the_openai_type(server: HttpServer) -> None:
    values = stream_values(
        server, COMPLETIONS, prompt=["a", "b"], stream_options={"include_usage": True}
    )
    texts = {0: "", 1: ""}
    for value in values[:-1]:
        choice = value["choices"][0]
        texts[choice["index"]] += choice["text"]
        # The package's type asks for a finish reason also where OpenAI sends a null.
        Completion.model_validate(
            {**value, "choices": [{**choice, "finish_reason": choice["finish_reason"] or "stop"}]},
            strict=True,
        )
    assert set(texts.values()) == {TEXT}
    assert Completion.model_validate(values[-1], strict=True).choices == []
    assert values[-1]["usage"]["prompt_tokens"] == 14


def test_a_chat_prompt_goes_without_messages(server: HttpServer) -> None:
    for prompt in ("plain text", [5, 6]):
        assert server.http.post(CHAT, json={"prompt": prompt}).status_code == 200
        sent = server.backend.requests[-1]
        assert sent.messages is None
        assert (sent.prompt if isinstance(prompt, str) else sent.prompt.tolist()) == prompt


def test_sampling_is_the_request_over_the_model_over_openai(server: HttpServer) -> None:
    server.chat(temperature=0, min_tokens=2, stop="\n", stop_token_ids=[5], max_completion_tokens=9)
    sampling = server.backend.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (
        0,
        20,
        0.95,
        0,
    )
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 9)
    assert (sampling.stop, sampling.stop_token_ids) == (("\n",), (5,))
    server.chat()
    assert server.backend.requests[-1].sampling.max_tokens is None


def test_the_stop_string_is_reported(server: HttpServer) -> None:
    assert server.chat(stop=["END"]).json()["choices"][0]["stop_reason"] == "END"


def test_messages_reach_the_template_as_it_knows_them(server: HttpServer) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": None},
    ]
    kwargs = {"enable_thinking": False}
    body = {"messages": messages, "chat_template_kwargs": kwargs}
    assert server.http.post(CHAT, json=body).status_code == 200
    sent = server.backend.requests[-1]
    assert sent.template_kwargs == kwargs
    assert sent.messages == (
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "12"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "reasoning": "hm",
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
    )


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [('{"a": [1]}', {"a": [1]}), ("", {}), (None, {}), ("{broken", "{broken"), ("[1]", "[1]")],
)
def test_arguments_that_are_not_an_object_reach_the_template_as_written(
    server: HttpServer, arguments: str | None, seen: Any
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*HI, {"role": "assistant", "tool_calls": [call]}, *HI]
    assert server.http.post(CHAT, json={"messages": messages}).status_code == 200
    sent = server.backend.requests[-1].messages
    assert sent is not None
    assert sent[1]["content"] is None
    (read,) = with_read_arguments(sent[1])["tool_calls"]
    assert read["function"] == {"name": "f", "arguments": seen}


def test_any_role_and_any_script_of_text_pass_unchanged(server: HttpServer) -> None:
    text = "\u4f60\u597d \U0001f468\u200d\U0001f469 e\u0301 \x00 \u2028 </s>"
    messages = [{"role": role, "content": text} for role in ROLES]
    messages.append({"role": "user", "content": "hi"})
    assert server.http.post(CHAT, json={"messages": messages}).status_code == 200
    assert server.backend.requests[-1].messages == tuple(messages)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_from_behind_is_a_4xx_and_no_stream(server: HttpServer, stream: bool) -> None:
    response = server.chat("refuse", stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == "messages"


def test_one_refused_prompt_refuses_the_request_and_aborts_the_others(server: HttpServer) -> None:
    response = server.http.post(COMPLETIONS, json={"prompt": ["silent", "refuse"]})
    assert response.status_code == 400
    assert server.backend.requests[-2].uid in server.backend.aborted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        (
            lambda one: one.cancel(None, MinisrvError("", code="request_aborted")),
            500,
            "request_aborted",
        ),
        (lambda one: one.hold("a process has died"), 503, "engine_restarted"),
        (lambda one: one.fail_all(EngineDeadError("")), 500, "engine_dead"),
    ],
)
def test_a_request_that_ends_while_it_is_sent_gets_the_reason(
    end: Callable[[RequestRegistry], object], status: int, code: str, stream: bool
) -> None:
    with serve(resume=False) as server:

        def send(index: int, message: Any) -> None:
            server.backend.send(index, message)
            if len(server.backend.requests) == 1:
                server.loop.call_soon(end, server.registry)

        server.registry.connect(send)
        body = {"prompt": ["silent"] * (2 * CHOICES_AT_ONCE), "stream": stream}
        reply = server.http.post("/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert len(server.backend.requests) == CHOICES_AT_ONCE


def test_a_failure_in_a_stream_is_an_error_event_and_done(server: HttpServer) -> None:
    *chunks, last = stream_values(server, CHAT, messages=[{"role": "user", "content": "break"}])
    assert chunks[-1]["choices"][0]["delta"] == {"content": WORDS[0]}
    assert last == {
        "error": {
            "message": "broken",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
