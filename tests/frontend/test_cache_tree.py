"""GET /v1/cache/tree over a real cache: what it returns, what it refuses, how often it asks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from minisrv.frontend.ops import cache_tree
from minisrv.wire.messages import ShowTreeMsg
from tests.support import scripted_backend
from tests.support.http_server import HttpServer, serve

ROUTE = "/v1/cache/tree"


def fill(server: HttpServer, prompts: dict[int, list[int]]) -> None:
    """Let requests that have ended leave these prompts, of 4 tokens a page, in the cache."""
    cache = server.backend.cache
    for uid, prompt in prompts.items():
        ids = np.array(prompt, np.int32)
        cache.tree.now = 98.5
        lease = cache.open_lease(uid=uid)
        cache.extend_match(lease, ids, 0, -1)
        cache.grow(lease, len(ids))
        cache.close_lease(lease, ids, len(ids))


def get(server: HttpServer, **params: Any) -> dict[str, Any]:
    response = server.http.get(ROUTE, params=params)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_the_nodes_the_counts_and_the_path_of_a_request() -> None:
    with serve() as server:
        reply = server.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}]},
            headers={"X-Request-Id": "mine"},
        )
        (message,) = server.backend.requests
        shared, first, second = [1] * 8, [2] * 4, [3] * 8
        fill(server, {message.uid: shared + first, 999: shared + second})
        body = get(server, request_id="mine")
        assert body["page_size"] == 4
        assert body["pages"] == {"total": 100, "used": 0, "tree": 5}
        assert body["num_nodes"] == 3
        nodes = {node["id"]: node for node in body["nodes"]}
        assert len(nodes) == 3
        upper, lower = body["path"]
        assert nodes[upper] == {
            **{"id": upper, "parent": 0, "tokens": 8, "pages": 2, "pins": 0, "last_use_s": 1.5}
        }
        assert (nodes[lower]["parent"], nodes[lower]["tokens"]) == (upper, 4)
        assert get(server, request_id=reply.json()["id"])["path"] == [upper, lower]
        assert get(server, request_id="another")["path"] is None
        assert "path" not in get(server)
        few = get(server, max_nodes=2, request_id="mine")
        assert [node["id"] for node in few["nodes"]] == [upper, lower]
        assert few["num_nodes"] == 3


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ("max_nodes=0", "max_nodes"),
        ("max_nodes=1e3", "max_nodes"),
        ("max_nodes=" + "9" * 5000, "max_nodes"),
        ("text=1", "text"),
        ("depth=3", "depth"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(
    server: HttpServer, params: str, param: str
) -> None:
    response = server.http.get(f"{ROUTE}?{params}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_page_of_another_origin_gets_nothing(server: HttpServer) -> None:
    assert server.http.get(ROUTE).status_code == 200
    for origin in ("http://evil.example", "null"):
        assert server.http.get(ROUTE, headers={"Origin": origin}).status_code == 403
    for site, status in (
        ("same-origin", 200),
        ("none", 200),
        ("cross-site", 403),
        ("same-site", 403),
    ):
        response = server.http.get(ROUTE, headers={"Sec-Fetch-Site": site})
        assert response.status_code == status, site
    assert server.http.get(ROUTE, headers={"Host": "evil.example"}).status_code == 421


def test_queries_wait_so_that_the_scheduler_spends_a_hundredth_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve() as server:
        cost_s = 0.002

        def describe(cache: Any, message: ShowTreeMsg, now: float) -> dict[str, Any]:
            tree = real(cache, message, now)
            return {**tree, "seconds": cost_s}

        real = scripted_backend.describe_tree
        monkeypatch.setattr(scripted_backend, "describe_tree", describe)
        began = time.monotonic()
        get(server)
        get(server)
        assert time.monotonic() - began >= 0.8 * cost_s / cache_tree.MAX_SHARE
