"""/openapi.json against the routes: every operation says what it takes and how it may refuse."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.support.http_server import HttpServer, serve

Operations = list[tuple[str, str, dict[str, Any]]]

ADMIN_PATHS = {"/drain", "/v1/cache/tree", "/server_info", "/flush_cache", "/abort_request"}


def operations_of(server: HttpServer) -> Operations:
    paths = server.http.get("/openapi.json").json()["paths"]
    return [
        (method, path, operation)
        for path, item in paths.items()
        for method, operation in item.items()
    ]


@pytest.fixture(scope="module")
def operations(server: HttpServer) -> Operations:
    return operations_of(server)


def test_every_operation_that_needs_a_key_may_answer_401(operations: Operations) -> None:
    assert {"/", "/version", "/metrics", "/v1/models"} <= {path for _, path, _ in operations}
    for method, path, operation in operations:
        is_open = path in ("/", "/health", "/ready")
        assert ("401" in operation["responses"]) != is_open, (method, path)


def test_public_metrics_need_no_key() -> None:
    with serve(public_metrics=True) as server:
        (metrics,) = [op for _, path, op in operations_of(server) if path == "/metrics"]
        assert "401" not in metrics["responses"]


def test_no_operation_has_the_frameworks_422(server: HttpServer) -> None:
    assert all("422" not in op["responses"] for _, _, op in operations_of(server))
    text = server.http.get("/openapi.json").text
    assert "ValidationError" not in text
    assert "$ref" not in text  # nothing refers to the schemas that went with it


def test_only_the_operations_of_administrators_may_answer_403(operations: Operations) -> None:
    refusing = {path for _, path, op in operations if "403" in op["responses"]}
    assert refusing == ADMIN_PATHS


def test_an_operation_with_a_body_says_how_bodies_are_refused(
    server: HttpServer, operations: Operations
) -> None:
    for method, path, operation in operations:
        answer = server.http.request(method, path, content=b"x", headers={"Content-Type": "a/b"})
        reads = answer.status_code == 415
        assert ("requestBody" in operation) == reads, path
        if reads:
            assert {"400", "408", "413", "415"} <= operation["responses"].keys(), path
            (content,) = operation["requestBody"]["content"].items()
            assert content[0] == "application/json"
            Draft202012Validator.check_schema(content[1]["schema"])
            without = server.http.request(method, path).status_code
            assert (without == 415) == operation["requestBody"]["required"], path


def test_each_refusal_of_a_key_and_of_a_body_is_in_the_documented_form() -> None:
    with serve(api_key=("user",), admin_key="admin") as server:
        key = {"Authorization": "Bearer admin"}
        document = server.http.get("/openapi.json", headers=key).json()["paths"]
        for path, item in document.items():
            for method, operation in item.items():
                for status, headers in [("401", {}), ("415", {**key, "Content-Type": "a/b"})]:
                    if status in operation["responses"]:
                        answer = server.http.request(method, path, content=b"x", headers=headers)
                        assert answer.status_code == int(status), path
                        told = operation["responses"][status]["content"]["application/json"]
                        Draft202012Validator(told["schema"]).validate(answer.json())
