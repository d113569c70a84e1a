"""Routes, states, headers and errors of the application."""

import json
import logging
import re

import httpx
import openai
import pytest
from openai.types import Model

from minisrv.errors import EngineDeadError, NotReadyError
from minisrv.wire.messages import Finish
from tests.support.http_server import MODEL, HttpServer, serve
from tests.support.scripted_backend import WORDS, reply

MESSAGE = {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}


def test_models_are_listed_and_retrieved_with_a_fixed_time(server: HttpServer) -> None:
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    for body in (*listed["data"], server.http.get(f"/v1/models/{MODEL.name}").json()):
        model = Model.model_validate(body, strict=True)
        assert (model.id, model.created) == (MODEL.name, MODEL.created)
        assert body["max_model_len"] == MODEL.max_model_len
    assert [model.id for model in server.openai.models.list()] == [MODEL.name]
    assert server.openai.models.retrieve(MODEL.name).id == MODEL.name


def test_an_unknown_model_id_is_404_and_names_the_served_one(server: HttpServer) -> None:
    for name in ("other", "org/other", "org/tiny/", ""):
        response = server.http.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert MODEL.name in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("PATCH", "/health", 405),
    ],
)
def test_the_routers_own_errors_have_the_one_form(
    server: HttpServer, method: str, path: str, status: int
) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (None, None)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ping", "/v1/health", "/ready"])
def test_probes_are_open_and_quiet_and_may_use_head(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minisrv")
    with serve(api_key=("key",)) as server:
        response = server.http.head(path)
        assert (response.status_code, response.content) == (200, b"")
        if path != "/ready":
            assert server.http.get(path).json() == {"status": "ok"}
            server.in_loop(lambda: server.registry.fail_all(EngineDeadError("gone")))
            assert server.http.get(path).status_code == 503
    assert not caplog.messages


def test_the_version_is_returned(server: HttpServer) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", server.http.get("/version").json()["version"])


def test_a_sane_request_id_is_kept_and_another_is_replaced(server: HttpServer) -> None:
    given = {"X-Request-Id": "abc-123"}
    assert server.http.get("/nothing", headers=given).headers["x-request-id"] == "abc-123"
    for bad in ("a b", "x" * 200, "\u00e9".encode("latin-1")):
        answer = server.http.get("/health", headers={"X-Request-Id": bad})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_cors_is_off_unless_asked_for(server: HttpServer) -> None:
    origin = {"Origin": "http://page.example"}
    assert "access-control-allow-origin" not in server.http.get("/health", headers=origin).headers
    with serve(cors_origins="http://page.example, http://b.example") as open_server:
        allowed = open_server.http.get("/nothing", headers=origin).headers
        assert allowed["access-control-allow-origin"] == "http://page.example"
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        response = open_server.http.options("/v1/chat/completions", headers=preflight)
        assert response.status_code == 200
        other = open_server.http.get("/health", headers={"Origin": "http://c.example"}).headers
        assert "access-control-allow-origin" not in other


def test_preflights_have_an_id_and_a_line_in_the_log_and_refusals_the_one_form(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "minisrv")

    def preflight(server: HttpServer, origin: str, method: str = "POST") -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": method}
        answer = server.http.options("/v1/responses", headers=headers)
        named = f"id={answer.headers['x-request-id']}"
        server.wait_until(lambda: named in caplog.text)
        assert f"OPTIONS /v1/responses status={answer.status_code} " in caplog.text
        return answer

    with serve(cors_origins="http://page.example", api_key=("user",)) as server:
        for method in ("GET", "POST", "DELETE"):
            assert preflight(server, "http://page.example", method).status_code == 200
        for origin, method in [("http://other.example", "GET"), ("http://page.example", "PUT")]:
            refused = preflight(server, origin, method)
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert "--cors-origins" in error["message"]
            assert refused.headers["vary"].startswith("Origin")


def test_a_page_may_read_the_headers_of_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr("minisrv.frontend.generation.event_reader.Usage.count", broken)
    with serve(cors_origins="http://page.example") as server:
        origin = {"Origin": "http://page.example"}
        message = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
        answer = server.http.post("/v1/messages", json=message, headers=origin)
        assert answer.status_code == 500
        assert answer.headers["access-control-allow-origin"] == "http://page.example"
        exposed = answer.headers["access-control-expose-headers"].lower()
        for name in ("x-request-id", "request-id", "x-should-retry"):
            assert name in exposed.split(", ")
            assert name in answer.headers


def test_a_parameter_that_the_framework_refuses_has_the_one_form() -> None:
    with serve() as server:

        @server.app.get("/typed")
        async def typed(count: int) -> int:
            return count

        assert server.http.get("/typed?count=2").json() == 2
        response = server.http.get("/typed?count=two")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "count"


def test_a_starting_server_is_alive_and_not_ready() -> None:
    with serve(ready=False) as server:
        server.in_loop(lambda: server.registry.set_progress("weights", 0.4))
        assert server.http.get("/health").status_code == 200
        response = server.http.get("/ready")
        assert response.status_code == 503
        assert response.json() == {"status": "loading", "phase": "weights", "progress": 0.4}
        for refused in (server.chat(), server.http.get("/v1/models")):
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "server_starting"
            assert "weights, 40%" in refused.json()["error"]["message"]
        server.in_loop(lambda: server.registry.set_ready(MODEL))
        assert server.http.get("/ready").json() == {"status": "ready"}
        assert server.chat().status_code == 200


def test_a_dead_engine_fails_waiting_requests_and_the_health_check() -> None:
    with serve() as server:
        stall = [{"role": "user", "content": "stall"}]
        stream = server.openai.chat.completions.create(model="", messages=stall, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        assert next(stream).choices[0].delta.content == WORDS[0]
        server.in_loop(lambda: server.registry.fail_all(EngineDeadError("the engine has died")))
        with pytest.raises(openai.APIError, match="the engine has died"):
            next(stream)
        response = server.chat()
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_dead"
        assert server.http.get("/health").status_code == 503
        assert server.http.get("/ready").json()["status"] == "dead"


def test_a_stopping_server_sends_clients_away_with_503() -> None:
    with serve() as server:
        error = NotReadyError("the server is stopping", code="server_draining")
        server.in_loop(lambda: server.registry.fail_all(error))
        response = server.chat()
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "server_draining"


def test_beyond_the_limit_requests_are_refused_with_503_until_one_has_ended() -> None:
    with serve(max_open_requests=3) as server:
        stall = [{"role": "user", "content": "stall"}]
        stream = server.openai.chat.completions.create(
            model="",
            messages=stall,
            stream=True,
            n=2,
        )
        next(stream)
        response = server.chat(n=2)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "server_overloaded"
        assert server.chat().status_code == 200
        stream.close()
        server.wait_until(lambda: server.registry.num_open == 0)
        assert server.chat(n=3).status_code == 200


def test_a_bug_is_a_500_that_names_the_request_and_nothing_else(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a secret path")

    monkeypatch.setattr("minisrv.frontend.generation.event_reader.Usage.count", broken)
    for stream in (False, True):
        response = server.chat(stream=stream)
        assert response.status_code == (200 if stream else 500)
        text = response.text.removeprefix("data: ").removesuffix("\n\ndata: [DONE]\n\n")
        error = json.loads(text)["error"]
        assert error["code"] == "internal_error"
        assert response.headers["x-request-id"] in error["message"]
        # It would fail again: clients that try a 500 three times are told not to.
        assert response.headers.get("x-should-retry") == (None if stream else "false")
        assert "secret" not in text
        (stack,) = [record for record in caplog.records if record.exc_info]
        assert response.headers["x-request-id"] in stack.getMessage()
        assert caplog.text.count("KeyError: 'a secret path'") == 1
        caplog.clear()


@pytest.mark.parametrize(
    "header", ["x-session-id", "Session-Id", "X-Claude-Code-Session-Id"]
)  # of opencode, Codex and Claude Code
def test_the_log_has_the_session_of_an_agent(
    server: HttpServer, caplog: pytest.LogCaptureFixture, header: str
) -> None:
    caplog.set_level(logging.INFO, "minisrv")
    for session in ("two words", "0199-ab"):
        server.http.get("/version", headers={header: session, "X-Request-Id": f"of-{header}"})
    server.wait_until(lambda: caplog.text.count(f"id=of-{header}") == 2)
    assert [" session=" in line for line in caplog.messages if "id=of-" in line] == [False, True]
    assert f" id=of-{header} session=0199-ab" in caplog.text


def test_a_request_has_a_first_and_a_last_line_in_the_log_and_a_probe_none(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minisrv")
    server.http.get("/health", headers={"X-Request-Id": "the-probe"})
    server.http.get("/ready", headers={"X-Request-Id": "the-probe"})
    request_id = server.chat(stream=True, n=2).headers["x-request-id"]

    def lines() -> list[str]:
        return [line for line in caplog.messages if request_id in line]

    server.wait_until(lambda: len(lines()) > 1)
    first, last = lines()
    assert first.startswith(f"started id={request_id} prompts=1 n=2 max_tokens=None stream=True")
    assert last.startswith("POST /v1/chat/completions status=200 ms=")
    assert "choices=2 prompt=7 cached=3 output=14 queue_ms=2.0 prefill_ms=30.0" in last
    assert "first_ms=" in last
    assert "the-probe" not in caplog.text


def test_a_draining_server_lets_open_requests_end_and_refuses_others() -> None:
    with serve() as server:
        backend, registry = server.backend, server.registry
        stall = [{"role": "user", "content": "stall"}]
        stream = server.openai.chat.completions.create(model="", messages=stall, stream=True)
        next(stream)
        uid = backend.requests[-1].uid
        server.in_loop(registry.start_drain)
        assert not server.in_loop(lambda: registry.is_idle)
        assert server.http.get("/ready").json() == {"status": "draining", "open_requests": 1}
        assert server.http.get("/ready").headers["retry-after"] == "1"
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/v1/models").status_code == 200
        refusals = [
            server.chat(),
            server.http.post("/v1/messages", json=MESSAGE),
            server.http.post("/tokenize", json={"prompt": "x"}),
        ]
        for refused in refusals:
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "the server is stopping" in refused.json()["error"]["message"]
        server.in_loop(lambda: backend.deliver(reply(uid, "end", 2, Finish.STOP)))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).endswith("end")
        server.wait_until(lambda: registry.is_idle)
        server.in_loop(lambda: registry.fail_all(EngineDeadError("the engine has died")))
        assert server.http.get("/ready").json()["status"] == "dead"
