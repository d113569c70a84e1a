"""Spans of requests, as a collector gets them that reads OTLP with OpenTelemetry's own types."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk.trace", reason="the packages of the extra otlp are missing")

from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.frontend.app import close_app, create_app
from minisrv.frontend.registry.registry import RequestRegistry
from tests.support.collector import Collector, collector, plain
from tests.support.http_server import HttpServer, serve

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GEN_AI = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[HttpServer, Collector]]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collector() as collected, serve(otlp_endpoint=collected.url) as server:
        yield server, collected
        close_app(server.app)


def of_server_timing(reply: httpx.Response) -> str:
    found = re.search(r'traceparent;desc="([0-9a-f-]+)"', reply.headers["Server-Timing"])
    assert found
    return found[1]


def test_a_chat_has_a_span_with_genai_names(traced: tuple[HttpServer, Collector]) -> None:
    server, collected = traced
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 3, "n": 2}
    headers = {"X-Request-Id": "r-1", "X-Session-Id": "s-1"}
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **sampling}
    reply = server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.status_code == 200
    model = server.registry.model.name
    (span,) = collected.wait_for(f"chat {model}")
    assert set(collected.paths) == {"/v1/traces"}
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.status.code == Status.STATUS_CODE_UNSET
    attributes = plain(span.attributes)
    assert {name for name in attributes if name.startswith("gen_ai.")} <= GEN_AI
    assert 0 < attributes.pop("gen_ai.response.time_to_first_chunk") < 60
    assert attributes.pop("gen_ai.usage.input_tokens") > 0
    assert attributes.pop("gen_ai.usage.cache_read.input_tokens") >= 0
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "minisrv",
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.conversation.id": "s-1",
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.output_tokens": 6,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "minisrv.request_id": "r-1",
    }
    collected.wait_for("decode")
    children = collected.children(span)
    assert children.keys() == {"queue", "prefill", "decode"}
    assert {child.trace_id for child in children.values()} == {span.trace_id}
    version, trace_id, span_id, flags = of_server_timing(reply).split("-")
    assert (version, trace_id, span_id) == ("00", span.trace_id.hex(), span.span_id.hex())
    assert int(flags, 16) & 1
    resource = plain(collected.requests[0].resource_spans[0].resource.attributes)
    assert resource["service.name"] == "minisrv"


def test_the_parent_and_its_decision_to_sample_are_taken_over(
    traced: tuple[HttpServer, Collector],
) -> None:
    server, collected = traced
    for sampled in ("01", "00"):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-{sampled}", "tracestate": "a=b"}
        reply = server.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-{sampled}", of_server_timing(reply))
    broken = {"traceparent": "00-zero-1"}
    assert server.http.post("/v1/completions", json={"prompt": "x"}, headers=broken).is_success
    first, second = collected.wait_for(f"text_completion {server.registry.model.name}", 2)
    assert first.trace_id.hex() == TRACE
    assert first.parent_span_id.hex() == PARENT
    assert first.trace_state == "a=b"
    assert second.trace_id.hex() != TRACE
    assert not second.parent_span_id


@pytest.mark.parametrize(
    ("prompt", "reason", "status"),
    [
        ("break", "internal_error", Status.STATUS_CODE_ERROR),
        ("refuse", "context_length_exceeded", Status.STATUS_CODE_UNSET),
    ],
)
def test_a_failure_is_named(
    prompt: str, reason: str, status: int, traced: tuple[HttpServer, Collector]
) -> None:
    server, collected = traced
    server.http.post("/v1/completions", json={"prompt": prompt, "stream": True})
    (span,) = collected.wait_for(f"text_completion {server.registry.model.name}")
    assert plain(span.attributes)["error.type"] == reason
    assert span.status.code == status


def test_a_client_that_leaves_has_a_span_too(traced: tuple[HttpServer, Collector]) -> None:
    server, collected = traced
    body = {"prompt": "stall", "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_lines())
    server.wait_until(lambda: server.registry.num_open == 0)
    (span,) = collected.wait_for(f"text_completion {server.registry.model.name}")
    assert plain(span.attributes)["error.type"] == "abort"


def test_requests_do_not_notice_a_collector_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    caplog.set_level(logging.INFO, "minisrv")
    with collector() as collected, serve(otlp_endpoint=collected.url + "/v1/traces") as server:
        collected.status = 503
        for _ in range(3):
            assert server.http.post("/v1/completions", json={"prompt": "x"}).is_success
            server.wait_until(lambda: "takes no traces; spans are lost" in caplog.text)
        collected.status = 200
        server.http.post("/v1/completions", json={"prompt": "x"})
        server.wait_until(lambda: "takes traces again" in caplog.text)
        close_app(server.app)
    assert caplog.text.count("takes no traces") == 1
    assert "opentelemetry" not in caplog.text


def test_neither_requests_nor_the_end_wait_for_a_collector_that_hangs(
    traced: tuple[HttpServer, Collector],
) -> None:
    server, collected = traced
    collected.answers.clear()
    assert server.http.post("/v1/completions", json={"prompt": "x"}).is_success
    server.wait_until(lambda: bool(collected.paths))
    started = time.monotonic()
    for _ in range(5):
        assert server.http.post("/v1/completions", json={"prompt": "x"}).is_success
    close_app(server.app)
    assert time.monotonic() - started < 9  # the exporter would wait for 10 s
    assert not collected.spans


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://x", "http://", "http://[", "http://h:x"])
def test_an_endpoint_that_is_not_a_url_is_refused(url: str) -> None:
    config = ServerConfig(otlp_endpoint=url)
    with pytest.raises(ConfigError, match=r"--otlp-endpoint is .*must be a URL such as http://"):
        create_app(config, RequestRegistry(config))
