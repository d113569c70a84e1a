"""Who gets in: nobody without a key, by whatever spelling of a path, but to the health routes."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.datastructures import Headers

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.frontend.http.access import Access, Keys
from tests.support.http_server import HttpServer, serve

USER, OTHER, ADMIN = "user-key", "other-key", "admin-key"
ADMIN_ROUTES = [
    ("GET", "/server_info"),
    ("GET", "/get_server_info"),
    ("GET", "/v1/cache/tree"),
    ("POST", "/flush_cache"),
    ("POST", "/abort_request"),
    ("POST", "/abort"),
    ("POST", "/drain"),
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[HttpServer]:
    with serve(api_key=(USER, OTHER), admin_key=ADMIN) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def raw_status(server: HttpServer, target: bytes, method: bytes = b"GET", *headers: bytes) -> int:
    """The status of a request whose bytes no client library has had in hand."""
    host, port = server.url.removeprefix("http://").split(":")
    own_host = any(header.lower().startswith(b"host") for header in headers)
    lines = [
        method + b" " + target + b" HTTP/1.1",
        *([] if own_host else [b"Host: a"]),
        *headers,
        b"Connection: close",
    ]
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        answer = connection.makefile("rb").readline()
    match = re.match(rb"HTTP/1.1 (\d+)", answer)
    assert match is not None, answer
    return int(match[1])


# Ways to write a path that some server has taken for a public one, or for another one.
SHAPES = [
    (b"/v1/models",),
    (b"/v1/models?x=/health",),
    (b"/v1/models?",),
    (b"/v1/models#/health",),
    (b"//v1/models",),
    (b"/v1//models",),
    (b"/./v1/models",),
    (b"/v1/./models",),
    (b"/health/../v1/models",),
    (b"/health/..%2fv1/models",),
    (b"/health%2f..%2fv1/models",),
    (b"/%2e%2e/v1/models",),
    (b"/v1%2fmodels",),
    (b"/v1%2Fmodels",),
    (b"/v1%252fmodels",),
    (b"/v1\\models",),
    (b"/v1%5cmodels",),
    (b"/%76%31/models",),
    (b"/V1/Models",),
    (b"/v1/models/",),
    (b"/v1/models.",),
    (b"/v1/models%00",),
    (b"/v1/models%0a",),
    (b"/v1/models%20",),
    (b"/v1/models;/health",),
    (b"/health;/../v1/models",),
    (b"/health/",),
    (b"/health//",),
    (b"/healthy",),
    (b"/healthz/",),
    (b"/v1/%68ealth",),
    (b"/v1/health/../models",),
    (b"/health.",),
    (b"/Health",),
    (b"/HEALTH",),
    (b"/%68ealth",),
    (b"/health%20",),
    (b"/health%0a",),
    (b"/health%00",),
    (b"/health%2f",),
    (b"//health",),
    (b"/ready/models",),
    (b"http://a/v1/models",),
    (b"http://a/health/../v1/models",),
    (b"*", b"OPTIONS"),
    (b"/v1/models", b"HEAD"),
    (b"/v1/models", b"OPTIONS"),
    (b"/v1/models", b"TRACE"),
    (b"/v1/chat/completions", b"POST"),
    (b"/v1/models", b"GET", b"Host: a/health?"),
    (b"/v1/models", b"GET", b"Host: a/health#"),
    (b"/v1/models", b"GET", b"X-Original-URL: /health"),
    (b"/v1/models", b"GET", b"X-Forwarded-Prefix: /health"),
    (b"/docs/",),
    (b"/docs/../v1/models",),
    (b"/%64ocs",),
    (b"/openapi.json",),
    (b"/metrics",),
    (b"/tokenize", b"POST"),
    (b"/flush_cache%0a", b"POST"),
    (b"/nothing",),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: b" ".join(shape).decode())
def test_no_spelling_of_a_path_gets_in_without_a_key(
    guarded: HttpServer, shape: tuple[bytes, ...]
) -> None:
    target, *rest = shape
    assert raw_status(guarded, target, *rest) == 401


@pytest.mark.parametrize("target", [b"/flush_cache", b"/%66lush_cache", b"/flush_cache%0a"])
def test_no_spelling_of_an_admin_path_gets_in_with_a_users_key(
    guarded: HttpServer, target: bytes
) -> None:
    key = f"Authorization: Bearer {USER}".encode()
    assert raw_status(guarded, target, b"POST", key) in (403, 404)


BAD_HEADERS: list[list[tuple[str, str]]] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", USER)],
    [("Authorization", f"Basic {USER}")],
    [("Authorization", f"Bearer {USER}x")],
    [("Authorization", f"Bearer {USER[:-1]}")],
    [("Authorization", f"Bearer {USER.upper()}")],
    [("Authorization", f"Bearer {USER},{OTHER}")],
    [("Authorization", f"Bearer {USER}"), ("Authorization", "Bearer wrong")],
    [("Authorization", "Bearer wrong"), ("X-Api-Key", USER)],
    [("X-Api-Key", "")],
    [("Cookie", f"api_key={USER}")],
]


@pytest.mark.parametrize("headers", BAD_HEADERS, ids=str)
def test_what_is_not_exactly_one_valid_key_is_401_in_the_one_form(
    guarded: HttpServer, headers: list[tuple[str, str]]
) -> None:
    response = guarded.http.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert USER not in response.text


def test_each_key_opens_in_either_header(guarded: HttpServer) -> None:
    for key in (USER, OTHER, ADMIN):
        assert guarded.http.get("/v1/models", headers=bearer(key)).status_code == 200
        assert guarded.http.get("/v1/models", headers={"X-Api-Key": key}).status_code == 200
        lower = {"authorization": f"bearer {key}"}
        assert guarded.http.get("/v1/models", headers=lower).status_code == 200


OPEN = ("/health", "/healthz", "/ping", "/v1/health", "/ready")


def routes_of(server: HttpServer) -> list[tuple[str, str]]:
    """Every method and path that the schema or the application knows."""
    schema = server.app.openapi()["paths"]
    known = {(method.upper(), path) for path, item in schema.items() for method in item}
    for route in server.app.routes:
        if path := getattr(route, "path", None):
            known |= {(method, path) for method in getattr(route, "methods", None) or ("GET",)}
    return sorted(known | set(ADMIN_ROUTES))


def test_every_route_but_health_and_the_pages_needs_a_key(guarded: HttpServer) -> None:
    routes = [one for one in routes_of(guarded) if not is_of_a_page(one[1])]
    assert {("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/metrics")} <= set(
        routes
    )
    for method, path in routes:
        status = guarded.http.request(method, path).status_code
        expected = 200 if path in OPEN else 401
        assert status == expected, (method, path, status)


def is_of_a_page(path: str) -> bool:
    """Their files are open (test_page.py, test_docs.py)."""
    return path in ("/", "/docs", "/redoc") or path.startswith(("/page/", "/docs/"))


def test_admin_routes_need_the_admin_key(guarded: HttpServer) -> None:
    for method, path in ADMIN_ROUTES:
        response = guarded.http.request(method, path, headers=bearer(USER))
        assert response.status_code == 403, path
        assert response.json()["error"]["type"] == "permission_error"
    assert guarded.http.get("/server_info", headers=bearer(ADMIN)).status_code == 200


def test_the_openai_client_gets_in_with_a_key_and_an_error_without(guarded: HttpServer) -> None:
    def client(key: str) -> Any:
        return openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)

    assert client(OTHER).models.list().data
    with pytest.raises(openai.AuthenticationError, match="needs a key"):
        client("wrong").models.list()


def test_a_body_is_not_read_before_the_key(guarded: HttpServer) -> None:
    length = b"Content-Length: 1000000"
    assert raw_status(guarded, b"/v1/completions", b"POST", length) == 401


def test_browsers_may_ask_without_a_key_and_see_why_they_are_refused() -> None:
    origin = {"Origin": "http://page.example"}
    with serve(api_key=(USER,), cors_origins="http://page.example") as server:
        preflight = {
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        answer = server.http.options("/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-headers"] == "authorization"
        refused = server.http.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://page.example"


def test_metrics_can_be_made_public() -> None:
    with serve(api_key=(USER,), public_metrics=True) as server:
        assert server.http.get("/metrics").status_code == 200
        assert server.http.get("/metrics/").status_code == 401
        assert server.http.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("options", "without", "with_wrong", "admin"),
    [
        ({}, 200, 200, 200),
        ({"host": "0.0.0.0"}, 200, 200, 403),
        ({"api_key": (USER,)}, 401, 401, 401),
        ({"admin_key": ADMIN}, 200, 200, 403),
    ],
)
def test_which_keys_are_set_says_what_is_open(
    options: dict[str, Any], without: int, with_wrong: int, admin: int
) -> None:
    with serve(**options) as server:
        assert server.http.get("/v1/models").status_code == without
        assert server.http.get("/v1/models", headers=bearer("none")).status_code == with_wrong
        assert server.http.get("/server_info").status_code == admin


TWO_KEYS = [
    [("Authorization", "Bearer wrong"), ("X-Api-Key", "other")],
    [("Authorization", f"Bearer {ADMIN}"), ("X-Api-Key", "other")],
    [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {ADMIN}")],
    [("Authorization", f"Basic {ADMIN}"), ("X-Api-Key", ADMIN)],
]


@pytest.mark.parametrize("headers", TWO_KEYS, ids=str)
def test_two_keys_are_refused_also_where_none_is_needed(headers: list[tuple[str, str]]) -> None:
    same = [("Authorization", f"Bearer {ADMIN}"), ("X-Api-Key", ADMIN)]
    with serve(admin_key=ADMIN) as server:
        for path in ("/v1/models", "/server_info"):
            assert server.http.get(path, headers=headers).status_code == 401
            assert server.http.get(path, headers=same).status_code == 200
        assert server.http.get("/health", headers=headers).status_code == 200
    with serve() as server:  # without configured keys, none is wrong
        assert server.http.get("/v1/models", headers=headers).status_code == 200


def test_a_page_in_a_browser_is_not_an_administrator() -> None:
    with serve() as server:
        for origin in ("http://page.example", "null", ""):
            response = server.http.post("/flush_cache", headers={"Origin": origin})
            assert response.status_code == 403
        assert server.http.get("/v1/models", headers={"Origin": "null"}).status_code == 200


def test_under_another_server_the_admin_routes_are_closed_without_a_key() -> None:
    open_keys = Keys.of(ServerConfig(), host_is_ours=False)
    assert open_keys.access(Headers()) == (Access.USER, False)
    assert Keys.of(ServerConfig()).access(Headers()) == (Access.ADMIN, False)


def test_without_an_admin_key_a_users_key_opens_no_admin_route() -> None:
    with serve(api_key=(USER,)) as server:
        assert server.http.get("/server_info", headers=bearer(USER)).status_code == 403


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": ("",)},
        {"api_key": ("good", " ")},
        {"api_key": ("two words",)},
        {"api_key": ("\u00e9",)},
        {"admin_key": ""},
        {"api_key_file": "/no/such/file"},
    ],
)
def test_a_key_that_cannot_guard_is_refused_at_the_start(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Keys.of(ServerConfig(**options))


def test_keys_come_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# those of the team\nfirst\n\n second \n")
    with serve(api_key_file=str(path), api_key=("third",)) as server:
        for key in ("first", "second", "third"):
            assert server.http.get("/v1/models", headers=bearer(key)).status_code == 200
        assert server.http.get("/v1/models", headers=bearer("#")).status_code == 401
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no keys"):
        Keys.of(ServerConfig(api_key_file=str(path)))


def test_no_secret_is_shown(guarded: HttpServer) -> None:
    text = guarded.http.get("/server_info", headers=bearer(ADMIN)).text
    config = ServerConfig(api_key=(USER,), admin_key=ADMIN)
    for secret in (USER, OTHER, ADMIN):
        assert secret not in text
        assert secret not in repr(config)
    assert "api_key" not in json.loads(text)["config"]


def test_a_websocket_is_refused(guarded: HttpServer) -> None:
    upgrade = (
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Connection: Upgrade",
    )
    assert raw_status(guarded, b"/health", b"GET", *upgrade) in (200, 403)
    assert raw_status(guarded, b"/v1/models", b"GET", *upgrade) in (401, 403)


def test_the_number_of_a_key_is_its_place_and_0_without_exactly_one() -> None:
    keys = Keys(["a", "b"], "c", loopback=False)
    for number, key in enumerate("abc", 1):
        assert keys.number(Headers(bearer(key))) == number
        assert keys.number(Headers({"x-api-key": key})) == number
    for headers in ({}, bearer("d"), {**bearer("a"), "x-api-key": "b"}):
        assert keys.number(Headers(headers)) == 0


@pytest.mark.parametrize("fair", [True, False])
def test_with_fair_keys_a_request_carries_the_number_of_its_key(fair: bool) -> None:
    with serve(api_key=("a", "b"), fair_keys=fair) as server:
        for key in "ab":
            chat = {"messages": [{"role": "user", "content": "hi"}]}
            answer = server.http.post("/v1/chat/completions", json=chat, headers=bearer(key))
            assert answer.status_code == 200
        assert [message.key for message in server.backend.requests] == ([1, 2] if fair else [0, 0])
