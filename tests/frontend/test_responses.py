"""POST /v1/responses over HTTP, as the `openai` package reads it."""

import asyncio
import functools
import json

import openai
import pytest

from minisrv.frontend.generation import run as responder
from tests.support.http_server import HttpServer, serve
from tests.support.response_wire import EVENT, PATH, events, joined, plain, shape, whole
from tests.support.scripted_backend import TEXT, WORDS, ScriptedBackend


def test_a_text_is_answered(server: HttpServer) -> None:
    response = server.openai.responses.create(model="org/tiny", input="hi")
    assert response.output_text == TEXT
    assert response.status == "completed"
    assert response.id.startswith("resp_")
    assert response.usage is not None
    assert response.usage.model_dump() == {
        "input_tokens": 7,
        "input_tokens_details": {
            "cached_tokens": 3,
            "cache_write_tokens": 0,
            "cache_write_tokens_details": None,
        },
        "output_tokens": len(WORDS) + 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 7 + len(WORDS) + 1,
    }
    assert whole(server).incomplete_details is None


def test_the_events_of_a_text_come_in_the_order_of_openai(server: HttpServer) -> None:
    stream = events(server)
    assert [event.type.removeprefix("response.") for event in stream] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * len(WORDS),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    (item,) = joined(stream)
    assert item["content"] == [
        {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    ]
    created, last = stream[0].response, stream[-1].response
    assert (created.status, created.output, created.usage) == ("in_progress", [], None)
    assert (created.id, created.created_at) == (last.id, last.created_at)
    assert plain(last) == plain(whole(server))


def test_the_stream_helper_of_the_client_assembles_a_text(server: HttpServer) -> None:
    with server.openai.responses.stream(model="org/tiny", input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == TEXT
    assert final.status == "completed"


def test_the_async_client_reads_a_stream(server: HttpServer) -> None:
    async def read() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.responses.create(model="org/tiny", input="hi", stream=True)
            return [e.delta async for e in stream if e.type == "response.output_text.delta"]

    assert "".join(asyncio.run(read())) == TEXT


def test_a_reply_at_its_limit_is_incomplete(server: HttpServer) -> None:
    response = whole(server, max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert shape(response.output) == [("message", "incomplete", "".join(WORDS[:2]))]
    stream = events(server, max_output_tokens=2)
    assert stream[-1].type == "response.incomplete"
    assert plain(stream[-1].response) == plain(response)


def test_a_stream_that_breaks_off_ends_with_a_failed_response(server: HttpServer) -> None:
    stream = events(server, input="break")
    assert stream[-1].type == "response.failed"
    failed = stream[-1].response
    assert (failed.status, failed.error.code, failed.error.message) == (
        *("failed", "server_error"),
        "broken",
    )
    deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert deltas == [WORDS[0]]


def test_a_refusal_after_a_ping_is_a_failed_response(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responder, "FIRST_PING_S", 0.0)
    with serve(make_backend=functools.partial(ScriptedBackend, step_s=0.2)) as slow:
        body = {"input": "refuse", "stream": True}
        text = slow.http.post(PATH, json=body).text
    ping, *frames, rest = text.split("\n\n")
    assert (ping, rest) == (": ping", "")
    values = [json.loads(frame.split("data: ")[1]) for frame in frames if "data: " in frame]
    read = [EVENT.validate_python(value, strict=True) for value in values]
    assert [event.type for event in read] == [
        *("response.created", "response.in_progress", "response.failed"),
    ]
    assert (read[-1].response.error.code, read[-1].response.error.param) == (
        *("invalid_prompt", "input"),
    )


def test_a_failure_before_any_output_is_an_error_of_http(server: HttpServer) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            server.openai.responses.create(model="org/tiny", input="refuse", stream=stream)
        assert (raised.value.param, raised.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.InternalServerError):
        server.openai.responses.create(model="org/tiny", input="break")


def test_an_open_response_is_aborted_by_its_id(server: HttpServer) -> None:
    body = {"input": "stall", "stream": True, "request_id": "mine"}
    with server.http.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        next(line for line in lines if "output_text.delta" in line)
        assert server.http.post("/abort_request", json={"rid": "resp_mine"}).json() == {
            "aborted": 1
        }
        last = [line for line in lines if line][-2:]
    assert last[0] == "event: response.failed"
