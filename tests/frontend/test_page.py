"""The files of the page: open to everybody, without data, under a policy that lets nothing in."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from minisrv.frontend.ops.page import FOLDER
from tests.support.http_server import MODEL, HttpServer, serve


@pytest.fixture(scope="module")
def guarded() -> Iterator[HttpServer]:
    with serve(api_key=("user",), admin_key="admin") as server:
        yield server


def test_the_files_are_open_and_hold_no_data(guarded: HttpServer) -> None:
    for path in FOLDER.rglob("*.*"):
        name = path.relative_to(FOLDER).as_posix()
        response = guarded.http.get("/" if name == "index.html" else f"/page/{name}")
        assert response.status_code == 200, name
        assert response.content == path.read_bytes()
        assert MODEL.name.encode() not in response.content
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        again = guarded.http.get(
            response.request.url, headers={"If-None-Match": response.headers["etag"]}
        )
        assert (again.status_code, again.content) == (304, b"")
    for other in ("/page/", "/page/app.py", "/page/../app.js", "/page/%61pp.js", "/page/vendor"):
        assert guarded.http.get(other).status_code == 401, other


def test_every_file_that_the_page_asks_for_is_there_and_none_is_elsewhere() -> None:
    names = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*")}
    used = set()
    for path in FOLDER.glob("*.*"):
        text = path.read_text()
        used |= set(re.findall(r'from "\./([^"]+)"', text))
        used |= set(re.findall(r'(?:href|src)="page/([^"#]+)', text))
        outside = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"'`]*", text))
        assert outside <= {"http://www.w3.org/2000/svg"}, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text)
    assert used | {"index.html", "icons.svg", "vendor/marked.LICENSE"} == names


def test_the_page_has_no_inline_script_or_style() -> None:
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", html) == [""]


def test_the_links_of_the_page_lead_somewhere(guarded: HttpServer) -> None:
    links = re.findall(r'<a href="([^"]+)"', guarded.http.get("/").text)
    assert {"docs", "metrics", "v1/models"} <= set(links)
    for link in links:
        response = guarded.http.get(f"/{link}", headers={"Authorization": "Bearer user"})
        assert response.status_code == 200, link
