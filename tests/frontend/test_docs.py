"""/docs and /redoc: open files without data, and what openapi.json gives them to show."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from minisrv.llm import LLM
from tests.support.engine_backend import EngineBackend
from tests.support.http_server import MODEL, HttpServer, serve

PAGES = ("/docs", "/redoc")
USER = {"Authorization": "Bearer user"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[HttpServer]:
    with serve(api_key=("user",), admin_key="admin") as server:
        yield server


@pytest.mark.parametrize("path", PAGES)
def test_the_files_are_open_hold_no_data_and_load_nothing_from_elsewhere(
    guarded: HttpServer, path: str
) -> None:
    page = guarded.http.get(path)
    assert MODEL.name not in page.text
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) >= 4
    assert "<style" not in page.text
    assert re.findall(r"<script[^>]*>([^<]+)</script>", page.text) == []
    for link in links:
        assert not link.startswith(("/", "http")), link  # behind any prefix
        file = guarded.http.get(f"/{link}")
        assert file.status_code == 200, link
        assert file.headers["content-security-policy"].startswith("default-src 'self'")
    for other in ("/docs/", "/docs/docs.html", "/docs/../openapi.json", "/openapi.json"):
        assert guarded.http.get(other).status_code == 401, other


def test_a_key_is_described_where_it_is_needed(guarded: HttpServer, server: HttpServer) -> None:
    for one, security in ((guarded, [{"bearer": []}]), (server, [{"bearer": []}, {}])):
        document = one.http.get("/openapi.json", headers=USER).json()
        assert document["components"]["securitySchemes"] == {
            "bearer": {"type": "http", "scheme": "bearer"}
        }
        for path, item in document["paths"].items():
            for operation in item.values():
                expected = None if path in ("/", "/health", "/ready") else security
                assert operation.get("security") == expected, path
        assert "servers" not in document


@pytest.fixture(scope="module")
def engine() -> Iterator[HttpServer]:
    with (
        LLM("demo", num_threads=1, num_pages=100, max_seq_len=512) as llm,
        serve(make_backend=functools.partial(EngineBackend, llm=llm)) as server,
    ):
        yield server


def test_every_example_is_answered(engine: HttpServer) -> None:
    paths = engine.http.get("/openapi.json").json()["paths"]
    tried = []
    for path, item in paths.items():
        body = item.get("post", {}).get("requestBody")
        if body and path != "/flush_cache":  # this backend has nobody to answer it
            (content,) = body["content"].values()
            example: dict[str, Any] = content["example"]
            Draft202012Validator(content["schema"]).validate(example)
            response = engine.http.post(path, json=example)
            # Nothing is open that could be aborted.
            expected = 404 if path == "/abort_request" else 200
            assert response.status_code == expected, (path, response.text)
            assert "x-minisrv-warnings" not in response.headers
            tried.append(path)
    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"} <= set(tried)
    (parameter,) = paths["/v1/models/{model_id}"]["get"]["parameters"]
    (name,) = [example["value"] for example in parameter["examples"].values()]
    assert engine.http.get(f"/v1/models/{name}").json()["id"] == MODEL.name
