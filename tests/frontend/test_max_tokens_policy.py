"""What becomes of a `max_tokens` that the context has no room for, on each API."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import anthropic
import openai
import pytest

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.config import ServerConfig
from minisrv.frontend.generation import run
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.states import Serving
from minisrv.llm import LLM
from minisrv.wire.messages import PromptsMsg
from tests.support.engine_backend import EngineBackend
from tests.support.http_server import MODEL, HttpServer, serve

CONTEXT = 96
HI: list[Any] = [{"role": "user", "content": "Tell me a story."}]
LONG: list[Any] = [{"role": "user", "content": "Tell me a story. " * CONTEXT}]
ENDLESS = {"ignore_eos": True}
WARNINGS = "x-minisrv-warnings"


@pytest.fixture(scope="module")
def engine() -> Iterator[HttpServer]:
    with (
        LLM("demo", num_threads=1, num_pages=60, max_seq_len=CONTEXT) as llm,
        serve(make_backend=functools.partial(EngineBackend, llm=llm)) as server,
    ):
        yield server


@pytest.fixture
def claude(engine: HttpServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=engine.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def policy(engine: HttpServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """Serves under the policy that the test is parametrized with."""
    before = engine.registry.model
    engine.registry.state = Serving(replace(before, max_tokens_policy=request.param))
    yield request.param
    engine.registry.state = Serving(before)


def test_a_message_ends_when_the_context_is_full(
    engine: HttpServer, claude: anthropic.Anthropic
) -> None:
    fields: dict[str, Any] = {"model": MODEL.name, "messages": HI, "max_tokens": 8_000}
    raw = claude.messages.with_raw_response.create(**fields, extra_body=ENDLESS)
    message = raw.parse()
    assert message.stop_reason == "model_context_window_exceeded"
    room = CONTEXT - message.usage.input_tokens - (message.usage.cache_read_input_tokens or 0)
    assert message.usage.output_tokens == room
    assert raw.headers[WARNINGS] == (
        f"max_tokens is 8000, but the context ends the reply after {room} tokens"
    )
    with claude.messages.stream(**{**fields, "max_tokens": 32_000}, extra_body=ENDLESS) as stream:
        assert stream.response.headers[WARNINGS].startswith("max_tokens is 32000, but")
        streamed = stream.get_final_message()
    assert streamed.stop_reason == "model_context_window_exceeded"
    exact = claude.messages.create(**{**fields, "max_tokens": room}, extra_body=ENDLESS)
    assert exact.stop_reason == "max_tokens"
    short = claude.messages.with_raw_response.create(**{**fields, "max_tokens": 1})
    assert WARNINGS not in short.headers


def test_a_response_that_fills_the_context_is_incomplete(engine: HttpServer) -> None:
    create = engine.openai.responses.with_raw_response.create
    raw = create(input="Tell me a story.", max_output_tokens=32_000, extra_body=ENDLESS)
    response = raw.parse()
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.total_tokens == CONTEXT
    room = response.usage.output_tokens
    assert raw.headers[WARNINGS] == (
        f"max_output_tokens is 32000, but the context ends the reply after {room} tokens"
    )


def test_a_chat_is_refused_with_the_largest_value_that_fits(engine: HttpServer) -> None:
    create = engine.openai.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="", messages=HI, max_tokens=32_000, extra_body=ENDLESS)
    assert refused.value.code == "context_length_exceeded"
    error: Any = refused.value.body
    room = error["n_ctx"] - error["n_prompt_tokens"]
    assert f"ask for at most {room} tokens of completion" in error["message"]
    reply = create(model="", messages=HI, max_tokens=room, extra_body=ENDLESS)
    assert reply.usage is not None
    assert reply.usage.total_tokens == CONTEXT


@pytest.mark.parametrize("policy", ["cap"], indirect=True)
def test_every_reply_is_capped_where_the_server_says_so(engine: HttpServer, policy: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HI, "max_completion_tokens": 500},
        "/v1/completions": {"prompt": ["Once", "Once upon a time"], "max_tokens": 500},
        "/generate": {"text": "Once", "sampling_params": {"max_new_tokens": 500, **ENDLESS}},
    }
    for path, body in bodies.items():
        extra = {} if path == "/generate" else ENDLESS
        reply = engine.http.post(path, json={**body, **extra})
        assert reply.status_code == 200, reply.text
        assert "is 500, but the context ends the reply after" in reply.headers[WARNINGS]
    completion = engine.http.post("/v1/completions", json={**bodies["/v1/completions"], **ENDLESS})
    assert [choice["finish_reason"] for choice in completion.json()["choices"]] == ["length"] * 2


@pytest.mark.parametrize("policy", ["refuse"], indirect=True)
def test_no_reply_is_capped_where_the_server_says_so(
    engine: HttpServer, claude: anthropic.Anthropic, policy: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match="exceed context limit"):
        claude.messages.create(model="", messages=HI, max_tokens=8_000)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        engine.openai.responses.create(input="hi", max_output_tokens=32_000)


@pytest.mark.parametrize("policy", ["auto", "cap"], indirect=True)
def test_a_prompt_that_does_not_fit_is_refused_everywhere(
    engine: HttpServer, claude: anthropic.Anthropic, policy: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(model="", messages=LONG, max_tokens=9)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
        engine.openai.responses.create(input=LONG, max_output_tokens=9)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        engine.openai.chat.completions.create(model="", messages=LONG)


def test_min_tokens_must_fit(engine: HttpServer) -> None:
    body = {"messages": HI, "max_tokens": 500, "min_tokens": 400}
    error = engine.http.post("/v1/messages", json=body).json()["error"]["message"]
    assert "exceed context limit" in error


def test_the_policy_is_an_option_of_the_server() -> None:
    config = ServerConfig(max_tokens_policy="cap")
    facts: dict[str, Any] = {"max_seq_len": 9, "vocab_size": 9, "sampling_defaults": {}}
    facts["chat_format"] = asdict(ChatFormat())
    assert ModelInfo.from_facts(config, facts).max_tokens_policy == "cap"


def test_a_stream_that_is_opened_before_its_first_token_has_the_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer reports the length of a prompt whose prefill takes long."""
    caplog.set_level(logging.INFO, "minisrv")
    monkeypatch.setattr(run, "FIRST_PING_S", 0.3)
    body = {"max_tokens": 2040, "stream": True, "request_id": "long"}
    body["messages"] = [{"role": "user", "content": "silent"}]
    with serve() as server:

        def report() -> None:
            uid = server.backend.requests[-1].uid
            server.registry.receive(PromptsMsg(uids=(uid,), prompt_tokens=(1000,)))

        def answer_and_leave() -> str:
            with server.http.stream("POST", "/v1/messages", json=body) as stream:
                return stream.headers[WARNINGS]

        with ThreadPoolExecutor() as pool:
            warning = pool.submit(answer_and_leave)
            server.wait_until(lambda: bool(server.backend.requests))
            server.in_loop(report)
            expected = "max_tokens is 2040, but the context ends the reply after 1048 tokens"
            assert warning.result(30) == expected
        server.wait_until(lambda: "id=long ended=abort" in caplog.text)
    assert "id=long ended=abort choices=1 prompt=1000 cached=0 output=0" in caplog.text
