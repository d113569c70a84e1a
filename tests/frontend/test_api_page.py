"""docs/api.md against the code: no route, metric or limit that the page does not name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from minisrv import sampling_params
from minisrv.frontend.apis.native import PARAMETERS
from minisrv.frontend.fields.common import MAX_SALT_CHARS
from minisrv.frontend.http import body_size
from minisrv.frontend.http.body import MAX_DEPTH
from minisrv.frontend.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS
from tests.support.http_server import serve
from tests.support.scripted_backend import stats

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_page_has_every_route_and_no_other_with_its_access() -> None:
    named: dict[tuple[str, str], str] = {}
    for route, access, _ in rows("Routes"):
        method = re.findall(r"GET|POST|DELETE", route)[0]
        for path in re.findall(r"(/[^`,\s]*)", route):
            named[method, path.replace("{id}", "{model_id}")] = access.split(",")[0]
    with serve(api_key=("user",), admin_key="admin") as server:
        schema = server.app.openapi()["paths"]
        real = {(method.upper(), path) for path, item in schema.items() for method in item}
        assert real <= named.keys()
        extra = {path for _, path in named.keys() - real}
        assert extra == {"/docs", "/redoc", "/openapi.json", "/abort"}
        for (method, path), access in named.items():
            without = server.http.request(method, path).status_code
            key = {"Authorization": "Bearer user"}
            with_key = server.http.request(method, path, headers=key).status_code
            assert (without != 401) == (access == "open"), path
            assert (with_key == 403) == (access == "admin"), path


def test_the_page_has_every_metric() -> None:
    with serve() as server:
        server.in_loop(lambda: server.registry.receive(stats()))
        text = server.http.get("/metrics").text
    assert "kv_cache_usage_perc" in text
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            assert family.name.removeprefix("minisrv:") in PAGE, family.name


def test_the_page_has_the_limits_of_the_code() -> None:
    limits = {row[0]: row[1] for row in rows("Limits")}
    assert f"{sampling_params.MAX_CHOICES}," in limits["`n`"]
    assert limits["`stop`"] == (
        f"{sampling_params.MAX_STOP_STRINGS} strings of {sampling_params.MAX_STOP_CHARS} characters"
    )
    assert limits["`stop_token_ids`"] == str(sampling_params.MAX_STOP_TOKEN_IDS)
    head = limits["line and headers of a request"]
    assert head == f"{MAX_HEAD_BYTES // 1024} KiB, {MAX_HEADERS} headers"
    assert limits["nesting of a body"] == f"{MAX_DEPTH} levels"
    assert limits["JSON values in a body"].startswith(f"{body_size.MAX_VALUES:,},")
    assert limits["token ids in a body"].startswith(f"{body_size.MAX_TOKEN_IDS:,},")
    assert limits["long numbers in a body"].startswith(f"{body_size.MAX_LONG_DIGITS:,} digits")


def test_the_page_has_the_sampling_parameters_of_generate() -> None:
    section = PAGE.split("\n### /generate\n")[1].split("\n### ")[0]
    assert PARAMETERS.keys() <= set(re.findall(r"`(\w+)`", section))


def test_the_page_has_the_request_fields_as_the_tables_have_them() -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "request_fields_table.py"))["table"]()
    assert table in PAGE, "run python scripts/request_fields_table.py"
    assert len(rows("Request fields")) == len(table.splitlines()) - 2
    assert MAX_SALT_CHARS == 128  # as the row of cache_salt says
