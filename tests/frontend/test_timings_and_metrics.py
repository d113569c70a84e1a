"""What an operator sees: figures of requests, metrics, and the abort of what is open."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minisrv import log
from minisrv.frontend.generation.groups import CHOICES_AT_ONCE
from minisrv.frontend.registry.status_line import StatusLine
from minisrv.wire.histogram import HistogramCounter
from tests.support.http_server import MODEL, HttpServer, serve
from tests.support.scripted_backend import TEXT, stats
from tests.support.stream_watch import request_bytes


def metrics_of(server: HttpServer) -> dict[str, Any]:
    """Values by name and labels other than the model's."""
    text = server.http.get("/metrics").text
    return {
        (sample.name, *sorted(v for k, v in sample.labels.items() if k != "model_name")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_timings_are_returned_on_request_whole_and_streamed(server: HttpServer) -> None:
    assert "timings" not in server.chat().json()
    whole = server.chat(timings=True)
    timings = whole.json()["timings"]
    assert (timings["queue_ms"], timings["prefill_ms"], timings["decode_ms"]) == (2.0, 30.0, 50.0)
    assert timings["decode_tokens_per_s"] == 6 / 0.05
    assert (timings["prompt_tokens"], timings["cached_tokens"]) == (7, 3)
    assert timings["output_tokens"] == 7
    assert timings["total_ms"] > 0
    for options in ({}, {"include_usage": True}):
        text = server.chat(timings=True, stream=True, stream_options=options).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        (chunk,) = [chunk for chunk in chunks if "timings" in chunk]
        assert chunk["choices"] == []
        assert chunk["timings"]["output_tokens"] == 7
        if options:
            assert chunk["usage"] is None
            assert chunks[-1]["usage"]["total_tokens"] == 14


def test_server_timing_reports_what_is_known_when_the_head_is_sent(server: HttpServer) -> None:
    whole = server.chat().headers["server-timing"]
    assert re.fullmatch(
        r'queue;dur=2.00, prefill;dur=30.00, decode;dur=50.00, total;dur=[\d.]+, cached;desc="3"',
        whole,
    )
    streamed = server.chat(stream=True).headers["server-timing"]
    assert streamed == 'queue;dur=2.00, prefill;dur=30.00, cached;desc="3"'


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": "no list"}),
        ("/v1/completions", {"prompt": "a", "n": 0}),
        ("/generate", {"text": "a", "input_ids": [1]}),
        ("/v1/responses", {"input": []}),
        ("/v1/messages", {"max_tokens": 0, "messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_a_refusal_has_the_id_that_the_body_names(
    server: HttpServer, path: str, body: dict[str, Any]
) -> None:
    answer = server.http.post(path, json={"request_id": "mine", **body})
    assert answer.status_code == 400
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/v1/messages"])
def test_two_ids_of_one_request_are_refused(server: HttpServer, path: str) -> None:
    answer = server.http.post(path, json={"request_id": "a", "rid": "b", "text": "a"})
    assert answer.status_code == 400
    assert "rid is b and request_id is a" in answer.text


@pytest.mark.parametrize("name", ["request_id", "rid"])
def test_the_body_may_name_the_request(server: HttpServer, name: str) -> None:
    response = server.chat(**{name: "mine-7"})
    assert response.headers["x-request-id"] == "mine-7"
    assert response.json()["id"] == "chatcmpl-mine-7"
    for bad in ("", "a b", "x" * 129, "new\nline"):
        refused = server.chat(**{name: bad})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == name


def test_metrics_count_requests_by_their_end() -> None:
    with serve() as server:
        server.chat(n=2)
        server.chat(max_tokens=2)
        server.chat("refuse")
        server.chat("break", stream=True)
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "stall", "stream": True}
        ) as stream:
            next(stream.iter_lines())
        server.wait_until(lambda: server.registry.num_open == 0)
        values = metrics_of(server)
        ends = {"stop": 2, "length": 1, "error": 2, "abort": 1}
        for reason, count in ends.items():
            assert values["minisrv:request_success_total", reason] == count
        assert values["minisrv:request_generation_tokens_sum",] == 7 + 7 + 2
        assert values["minisrv:request_max_num_generation_tokens_sum",] == 7 + 2
        assert values["minisrv:request_max_num_generation_tokens_count",] == 2
        assert values["minisrv:request_prompt_tokens_count",] == 3
        assert values["minisrv:time_to_first_token_seconds_count",] == 4
        assert values["minisrv:e2e_request_latency_seconds_count",] == 2
        assert values["minisrv:request_prefill_time_seconds_sum",] == pytest.approx(0.06)


def test_a_request_in_several_groups_is_counted_whole() -> None:
    num_prompts = 2 * CHOICES_AT_ONCE + 3
    with serve() as server:
        body = {"prompt": ["a"] * num_prompts, "timings": True}
        reply = server.http.post("/v1/completions", json=body).json()
        assert [choice["index"] for choice in reply["choices"]] == list(range(num_prompts))
        assert reply["usage"]["completion_tokens"] == 7 * num_prompts
        assert reply["usage"]["prompt_tokens"] == 7 * num_prompts
        assert reply["timings"]["output_tokens"] == 7 * num_prompts
        assert reply["timings"]["decode_ms"] == 50.0
        server.wait_until(lambda: server.registry.num_open == 0)
        values = metrics_of(server)
        assert values["minisrv:request_success_total", "stop"] == num_prompts
        assert values["minisrv:request_prompt_tokens_count",] == num_prompts
        assert values["minisrv:request_generation_tokens_sum",] == 7 * num_prompts


def test_metrics_count_http_by_route_method_and_status() -> None:
    with serve() as server:
        server.chat()
        server.http.get("/v1/models/org/tiny")
        server.http.get("/v1/models/a")
        for i in range(5):
            server.http.get(f"/made/up/{i}")
        server.http.request("PROPFIND", "/made/up")
        values = metrics_of(server)
        name = "minisrv:http_requests_total"
        assert values[name, "/v1/chat/completions", "200", "POST"] == 1
        assert values[name, "/v1/models/{model_id:path}", "200", "GET"] == 1
        assert values[name, "/v1/models/{model_id:path}", "404", "GET"] == 1
        # What a client makes up gets no series of its own.
        assert values[name, "404", "GET", "other"] == 5
        assert values[name, "404", "other", "other"] == 1
        assert values["minisrv:http_request_duration_seconds_count", "GET", "other"] == 5


def test_fields_that_change_nothing_are_counted_and_reported_to_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "minisrv")
    with serve(metrics_vllm_names=True) as server:
        for store in (True, False, None):
            response = server.chat(user="u", store=store, temperature=0)
            assert "x-minisrv-warnings" not in response.headers
        message = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
        server.http.post("/v1/messages", json={**message, "metadata": {"user_id": "u"}})
        text = server.http.get("/metrics").text
        lines = dict(line.split() for line in text.splitlines() if "harmless_request" in line[:30])
        assert {name: count for name, count in lines.items() if "_total" in name} == {
            'minisrv:harmless_request_fields_total{field="user"}': "3.0",
            'minisrv:harmless_request_fields_total{field="store"}': "2.0",
            'minisrv:harmless_request_fields_total{field="metadata"}': "1.0",
        }
    told = [record for record in caplog.records if "has no effect" in record.getMessage()]
    assert [record.levelno for record in told] == [logging.DEBUG] * 6
    assert "request field user has no effect" in caplog.messages


def test_the_schedulers_figures_are_shown_under_vllms_names_if_asked() -> None:
    with serve(metrics_vllm_names=True) as server:
        server.in_loop(lambda: server.registry.receive(stats()))
        server.chat(made_up=1)
        values = metrics_of(server)
        expected = {
            "num_requests_running": 3,
            "num_requests_waiting": 2,
            "kv_cache_usage_perc": 0.25,
            "prefix_cache_queries_total": 100,
            "prefix_cache_hits_total": 40,
            "prompt_tokens_total": 100,
            "generation_tokens_total": 70,
            "num_preemptions_total": 1,
            "inter_token_latency_seconds_count": 50,
        }
        for prefix in ("minisrv:", "vllm:"):
            for name, value in expected.items():
                assert values[prefix + name,] == value
            assert values[prefix + "cache_config_info", "16", "20"] == 1
            buckets = {
                key[1]: value
                for key, value in values.items()
                if key[0] == prefix + "inter_token_latency_seconds_bucket"
            }
            assert (buckets["0.003"], buckets["0.005"], buckets["+Inf"]) == (0, 50, 50)
        assert values["vllm:request_max_num_generation_tokens_sum",] == 7
        assert values["minisrv:unknown_request_fields_total",] == 1
        assert not any(key[0].startswith("vllm:http") for key in values)


def test_the_frontends_process_is_measured(server: HttpServer) -> None:
    values = metrics_of(server)
    assert values["process_resident_memory_bytes",] > 2**20
    assert values["process_cpu_seconds_total",] > 0
    assert values["process_open_fds",] > 2


def test_metrics_have_no_vllm_names_unless_asked(server: HttpServer) -> None:
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:" not in response.text
    assert f'model_name="{MODEL.name}"' in response.text


class Stalled:
    """A request that has had a word, or none, and waits for the next."""

    def __init__(self, server: HttpServer, rid: str, content: str, **fields: Any) -> None:
        num_open = server.in_loop(lambda: server.registry.num_open)
        self._thread = threading.Thread(target=self._run, args=(server, rid, content, fields))
        self._thread.start()
        server.wait_until(lambda: server.registry.num_open > num_open)

    def _run(self, server: HttpServer, rid: str, content: str, fields: dict[str, Any]) -> None:
        self.response = server.chat(content, rid=rid, **fields)

    def join(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive(), "the request hangs"
        return self.response


@pytest.mark.parametrize("path", ["/abort_request", "/abort"])
def test_an_abort_by_id_ends_that_request_with_an_error(path: str) -> None:
    with serve() as server:
        stream = Stalled(server, "s", "stall", stream=True)
        whole = Stalled(server, "w", "silent", n=2)
        other = Stalled(server, "o", "silent")
        assert server.http.post(path, json={"rid": "s"}).json() == {"aborted": 1}
        assert server.http.post(path, json={"request_id": "chatcmpl-w"}).json() == {"aborted": 1}
        events = stream.join().text.strip().split("\n\n")
        assert json.loads(events[-2][6:])["error"]["code"] == "request_aborted"
        assert events[-1] == "data: [DONE]"
        response = whole.join()
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "request_aborted"
        assert response.headers["x-should-retry"] == "false"
        assert server.in_loop(lambda: server.registry.num_open) == 1
        assert server.http.post(path, json={"rid": "s"}).status_code == 404
        assert server.http.post(path, json={"abort_all": True}).json() == {"aborted": 1}
        assert other.join().status_code == 500
        assert server.http.post(path, json={"abort_all": True}).status_code == 404
        assert sorted(server.backend.aborted) == [1, 2, 3, 4]
        assert metrics_of(server)["minisrv:request_success_total", "abort"] == 4


def test_an_abort_finds_an_id_that_looks_like_that_of_a_reply() -> None:
    with serve() as server:
        own = Stalled(server, "chatcmpl-q", "silent")
        plain = Stalled(server, "q", "silent")
        twice = Stalled(server, "msg_cmpl-z", "silent")

        def abort(rid: str) -> int:
            return server.http.post("/abort", json={"rid": rid}).status_code

        assert abort("cmpl-z") == 404
        assert abort("chatcmpl-q") == 200
        assert own.join().status_code == 500
        assert server.in_loop(lambda: server.registry.num_open) == 2
        assert abort("chatcmpl-q") == 200  # now the reply of q
        assert plain.join().status_code == 500
        assert abort("chatcmpl-msg_cmpl-z") == 200
        assert twice.join().status_code == 500


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"rid": "a", "abort_all": True},
        {"abort_all": False},
        {"rid": "a", "request_id": "b"},
    ],
)
def test_an_abort_says_either_one_or_all(server: HttpServer, body: dict[str, Any]) -> None:
    assert server.http.post("/abort_request", json=body).status_code == 400


def test_a_body_of_a_flush_without_its_type_is_not_passed_over(server: HttpServer) -> None:
    def flush(**headers: str) -> int:
        body = b'{"timeout": -5}'
        return server.http.post("/flush_cache", content=body, headers=headers).status_code

    assert flush() == 415
    assert flush(**{"Content-Type": "application/json"}) == 400


@pytest.mark.parametrize("stream", [False, True])
def test_the_last_line_of_a_request_that_ends_early_has_what_it_took(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minisrv")
    counts = "choices=2 prompt=7 cached=3 output=2 queue_ms=2.0"
    with serve() as server:

        def line(rid: str) -> str:
            def lines() -> list[str]:
                return [text for text in caplog.messages if f"id={rid} ended=" in text]

            server.wait_until(lambda: bool(lines()))
            return lines()[0]

        def has_begun() -> bool:
            return len(server.backend.started) == 2

        aborted = Stalled(server, "aborted", "stall", stream=stream, n=2)
        server.wait_until(has_begun)
        server.http.post("/abort", json={"rid": "aborted"})
        aborted.join()
        assert f"status={200 if stream else 500} " in line("aborted")
        assert f"id=aborted ended=abort {counts}" in line("aborted")
        server.chat("break", rid="broken", stream=stream, n=2)
        assert f"id=broken ended=error {counts}" in line("broken")
        server.backend.started.clear()
        body = {"prompt": "stall", "rid": "left", "stream": stream, "n": 2}
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(request_bytes("/v1/chat/completions", json.dumps(body).encode()))
            server.wait_until(has_begun)
        assert "status=499 " in line("left")
        assert f"id=left ended=abort {counts}" in line("left")
        assert server.chat(rid="whole").status_code == 200
    assert "id=whole ended" not in caplog.text


def test_an_abort_reports_unknown_fields() -> None:
    with serve() as server:
        open_request = Stalled(server, "u", "silent")
        answer = server.http.post("/abort", json={"rid": "u", "reason": "none"})
        assert answer.headers["x-minisrv-warnings"] == "unknown fields ignored: reason"
        assert open_request.join().status_code == 500


def test_native_generation_has_deltas_that_join_to_the_whole(server: HttpServer) -> None:
    whole = server.http.post("/generate", json={"text": "hi", "rid": "g"}).json()
    assert whole["text"] == TEXT
    assert whole["meta_info"] == {
        "id": "g",
        "finish_reason": {"type": "stop"},
        "prompt_tokens": 7,
        "cached_tokens": 3,
        "completion_tokens": 7,
    }
    lines = server.http.post("/generate", json={"input_ids": [1], "stream": True}).text.split(
        "\n\n"
    )
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["text"] for event in events) == TEXT
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * 6
    assert lines[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1000]}, "input_ids"),
        ({"text": "a", "sampling_params": {"n": 2}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"made_up": 1}}, "sampling_params.made_up"),
        ({"text": "a", "sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
        ({"text": "a", "sampling_params": {"top_p": "2"}}, "sampling_params.top_p"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": 5}, "sampling_params"),
    ],
)
def test_native_generation_refuses_what_it_cannot_do(
    server: HttpServer, body: dict[str, Any], param: str
) -> None:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_json_logs_have_the_figures_as_keys(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("minisrv")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    try:
        log.setup("test", "info", "json")
        log.event(logger, logging.INFO, "POST /x", {"status": 200, "stream": True})
        logger.warning('a "quoted" %s', "line\n")
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.items() >= {"event": "POST /x", "status": 200, "stream": True}.items()
    assert first.items() >= {"process": "test", "level": "info"}.items()
    assert second["event"] == 'a "quoted" line\n'


def test_the_status_line_reports_work_and_is_silent_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "minisrv")
    line = StatusLine()
    line.take(stats(), 0.0)
    line.take(stats(steps=10), 9.0)
    assert not caplog.messages
    counts = {"output_tokens": 170, "prompt_tokens": 120, "cached_tokens": 50}
    line.take(stats(steps=12, prefilled_tokens=90, **counts), 10.0)
    assert caplog.messages == [
        "status running=3 waiting=2 kv_use=0.25 prompt_tokens_per_s=3.0 output_tokens_per_s=10.0 "
        "cache_hits=0.5 preemptions=0"
    ]
    # A prompt that no step has completed yet.
    line.take(stats(steps=20, prefilled_tokens=5210, **counts), 20.0)
    assert "prompt_tokens_per_s=512.0 output_tokens_per_s=0.0 cache_hits=0.0" in caplog.messages[1]
    line.take(stats(steps=20, waiting=0), 40.0)
    assert len(caplog.messages) == 2


def test_histogram_buckets_hold_values_up_to_their_bound() -> None:
    counter = HistogramCounter((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        counter.count_value(value)
    counter.count_value(2.0, 10)
    assert counter.message().counts.tolist() == [2, 11, 1]
    assert counter.message().total == 32.0
