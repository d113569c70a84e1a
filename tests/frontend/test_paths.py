"""Paths as clients send them: HEAD, what is allowed, hints, and other prefixes of the API."""

from __future__ import annotations

from datetime import UTC, datetime

import anthropic
import openai
import pytest
from anthropic.types import ModelInfo

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from tests.support.http_server import MODEL, HttpServer, serve

HI = [{"role": "user", "content": "hi"}]
# As FastAPI has them, without what they show at a time.
CHANGING = {"/metrics", "/v1/loads"}


def test_head_is_answered_like_get_without_the_body(server: HttpServer) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    readable = [path for path, item in paths.items() if "get" in item]
    assert {"/", "/server_info", "/v1/models", "/v1/responses/{response_id}"} <= set(readable)
    for path in [*readable, "/docs", "/openapi.json", "/get_server_info"]:
        path = path.replace("{model_id}", MODEL.name)
        read, asked = server.http.get(path), server.http.head(path)
        assert asked.status_code == read.status_code, path
        assert asked.content == b""
        assert asked.headers["content-type"] == read.headers["content-type"]
        if path not in CHANGING:
            assert asked.headers["content-length"] == read.headers["content-length"], path
    assert all("head" not in item for item in paths.values())


def test_head_needs_the_key_that_get_needs() -> None:
    with serve(api_key=("user",), admin_key="admin") as server:
        user = {"Authorization": "Bearer user"}
        assert server.http.head("/v1/models").status_code == 401
        assert server.http.head("/v1/models", headers=user).status_code == 200
        assert server.http.head("/server_info", headers=user).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/responses/resp_1", "GET, HEAD, DELETE"),
        ("PATCH", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/server_info", "GET, HEAD"),
    ],
)
def test_allow_has_every_method_of_the_path(
    server: HttpServer, method: str, path: str, allowed: str
) -> None:
    response = server.http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert response.json()["error"]["message"] == (
        f"{method} {path} is not allowed; allowed: {allowed}"
    )


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/", "/v1/chat/completions"),
        ("POST", "/openai/v1/responses", "/v1/responses"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/models/org/tiny", "/v1/models/org/tiny"),
        ("HEAD", "/v1/metrics", "/metrics"),
        ("POST", "/models", None),
        ("POST", "/v1/chat/completion", None),
        ("GET", "/" + "a/" * 200 + "models", None),
    ],
)
def test_a_path_that_is_not_served_gets_the_one_that_was_meant(
    server: HttpServer, method: str, path: str, meant: str | None
) -> None:
    response = server.http.request(method, path)
    assert response.status_code == 404
    if method != "HEAD":
        message = response.json()["error"]["message"]
        hint = f"did you mean {meant}?" if meant else "see /docs for the available routes"
        assert message == f"there is no route {method} {path}; {hint}"


def test_an_alias_serves_the_api_for_base_urls_without_v1() -> None:
    with serve(api_alias=("/", "/openai/api/"), api_key=("user",)) as server:
        for base in ("", "/openai/api", "/v1"):
            with openai.OpenAI(base_url=server.url + base, api_key="user", max_retries=0) as client:
                assert client.chat.completions.create(model="", messages=HI).choices  # type: ignore[arg-type]
                assert client.models.retrieve(MODEL.name).id == MODEL.name
        user = {"Authorization": "Bearer user"}
        wrong = server.http.post("/openai/api/messages", json={}, headers=user)
        assert wrong.json()["type"] == "error"  # in the form of the route
        assert server.http.post("/openai/api/messages", json={}).status_code == 401
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.get("/openai/health", headers=user).status_code == 404
        assert server.http.post("/%6fpenai/api/messages", json={}, headers=user).status_code == 404


@pytest.mark.parametrize("prefix", ["v1", "", "/a b", "//", "/a?b", "/\u00e9"])
def test_a_prefix_must_be_a_path(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-alias is .*; it must be a path"):
        ServerConfig(api_alias=(prefix,))
    with pytest.raises(ConfigError, match=r"--root-path is .*; it must be a path"):
        ServerConfig(root_path=prefix)


def test_a_root_path_may_be_taken_off_by_the_proxy_or_not() -> None:
    with serve(root_path="/llm/", api_alias=("/",), api_key=("user",)) as server:
        user = {"Authorization": "Bearer user"}
        for prefix in ("", "/llm"):
            assert server.http.get(f"{prefix}/health").json() == {"status": "ok"}
            assert server.http.get(f"{prefix}/v1/models").status_code == 401
            assert server.http.get(f"{prefix}/v1/models", headers=user).status_code == 200
            reply = server.http.post(f"{prefix}/chat/completions", json={}, headers=user)
            assert reply.status_code == 400
        assert server.http.get("/llm/llm/health", headers=user).status_code == 404
        assert server.http.get("/%6clm/health", headers=user).status_code == 404
        document = server.http.get("/openapi.json", headers=user).json()
        assert document["servers"] == [{"url": "/llm"}]


def test_the_models_are_those_of_both_packages(server: HttpServer) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        page = client.models.list()
        assert [model.id for model in page] == [MODEL.name]  # there is no second page
        assert (page.first_id, page.last_id, page.has_more) == (MODEL.name, MODEL.name, False)
        model = client.models.retrieve(MODEL.name)
    assert model.display_name == MODEL.name
    assert model.created_at == datetime.fromtimestamp(MODEL.created, UTC)
    text = server.http.get(f"/v1/models/{MODEL.name}").text
    assert ModelInfo.model_validate_json(text, strict=True) == model
