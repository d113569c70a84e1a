"""Host: without a key, no page whose name was made to resolve to this machine reads anything."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from starlette.datastructures import Headers

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.frontend.http.hosts import AllowedHosts
from tests.frontend.test_access import ADMIN, USER, bearer, raw_status
from tests.support.http_server import serve

LOOPBACK = ["localhost", "LocalHost:8000", "localhost.", "x.localhost", "127.0.0.1", "127.8.9.1:1"]
LOOPBACK += ["[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "localhost:"]
ADDRESSES = ["192.168.1.5:8000", "8.8.8.8", "0.0.0.0:8000", "[fe80::1]:8000"]
FOREIGN = ["page.example", "page.example:8000", "localhost.page.example", "127.0.0.1.page.example"]
FOREIGN += ["", ":8000", "xlocalhost", "localhost:80@page.example", "page.example#localhost", "[]"]
FOREIGN += ["localhost, page.example", "[page.example]", "::1", "127.1", "0x7f.0.0.1", "\u00e9"]
MACHINE = socket.gethostname()


def allows(sent: str, /, *, host_is_ours: bool = True, **options: Any) -> bool:
    hosts = AllowedHosts(ServerConfig(**options), host_is_ours=host_is_ours)
    return hosts.allow(Headers({"host": sent}))


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_names_and_addresses_are_always_served(host: str) -> None:
    assert allows(host)
    assert allows(host, host="0.0.0.0")
    assert allows(host, host_is_ours=False)


@pytest.mark.parametrize("host", FOREIGN)
def test_no_other_name_is_served(host: str) -> None:
    assert not allows(host)
    assert not allows(host, host="0.0.0.0")
    assert not allows(host, host="::")
    assert not allows(host, host_is_ours=False)


@pytest.mark.parametrize("host", [*ADDRESSES, MACHINE, f"{MACHINE}.local:8000"])
def test_addresses_and_the_machines_name_are_served_unless_it_listens_on_loopback(
    host: str,
) -> None:
    assert not allows(host)
    assert not allows(host, host="localhost")
    assert allows(host, host="0.0.0.0")
    assert allows(host, host="192.168.1.5")
    assert allows(host, host_is_ours=False)


def test_the_host_option_and_allowed_hosts_are_served() -> None:
    assert allows("Box.Lan:8000", host="box.lan")
    assert not allows("box.lan", host="box.lan", host_is_ours=False)
    options = {"allowed_host": ("llm.example", "Other.Example", "fd00::7")}
    for host in ("llm.example:443", "other.example.", "[fd00::7]:8000"):
        assert allows(host, **options)
        assert allows(host, host_is_ours=False, **options)
    assert not allows("x.llm.example", **options)
    assert allows("anything.example", allowed_host="*")


def test_exactly_one_host_is_read() -> None:
    hosts = AllowedHosts(ServerConfig())
    assert not hosts.allow(Headers())
    assert not hosts.allow(Headers(raw=[(b"host", b"localhost"), (b"host", b"page.example")]))


@pytest.mark.parametrize("name", ["", "http://x", "x:80", "x/y", "a b", "[::1]", "::1]"])
def test_an_allowed_host_that_no_request_can_have_stops_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-host"):
        AllowedHosts(ServerConfig(allowed_host=(name,)))


def test_another_host_is_a_421_on_every_route_except_the_health_routes() -> None:
    with serve() as server:
        for path in ("/v1/models", "/server_info", "/openapi.json", "/metrics", "/nothing"):
            refused = server.http.get(path, headers={"Host": "page.example"})
            assert refused.status_code == 421
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "host_not_allowed")
            assert "'page.example'" in error["message"]
            assert "--allowed-host" in error["message"]
        for path in ("/health", "/ready"):
            assert server.http.get(path, headers={"Host": "page.example"}).status_code == 200
        messages = server.http.post("/v1/messages", headers={"Host": "page.example"})
        assert messages.status_code == 421
        assert messages.json()["type"] == "error"
        target = b"http://localhost/v1/models"  # only Host counts
        assert raw_status(server, target, b"GET", b"Host: page.example") == 421
        assert raw_status(server, target, b"GET", b"Host: localhost") == 200


def test_a_request_with_a_key_may_have_any_host() -> None:
    page = {"Host": "page.example"}
    with serve(api_key=(USER,), admin_key=ADMIN) as server:
        assert server.http.get("/v1/models", headers=page).status_code == 401
        for key in (USER, ADMIN):
            assert server.http.get("/v1/models", headers=page | bearer(key)).status_code == 200
    with serve(admin_key=ADMIN) as server:
        assert server.http.get("/v1/models", headers=page).status_code == 421
        assert server.http.get("/v1/models", headers=page | bearer("no")).status_code == 421
        assert server.http.get("/v1/models", headers=page | bearer(ADMIN)).status_code == 200
