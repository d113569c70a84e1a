"""The site of docs/: it builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Attributes whose address a browser loads by itself, by element; of links only some kinds.
LOADED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
NOT_LOADED = {"alternate", "author", "canonical", "license", "next", "prev"}
IN_STYLE = re.compile(r"url\(\s*[\"']?([^\"')]*)|@import\s+[\"']([^\"']*)")
ELSEWHERE = re.compile(r"(https?:)?//", re.IGNORECASE)
# Links of pages outside docs/, such as the README, to files and their sections.
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


class Resources(HTMLParser):
    """What a browser loads for a page of HTML, and the ids in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: set[str] = set()
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids.add(attributes.get("id", ""))
        self.urls += [attributes[name] for name in LOADED.get(tag, ()) if name in attributes]
        if tag == "link" and not set(attributes["rel"].split()) <= NOT_LOADED:
            self.urls.append(attributes["href"])
        self.urls += urls_in_style(attributes.get("style", ""))
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.urls += urls_in_style(data)


def urls_in_style(css: str) -> list[str]:
    return ["".join(groups) for groups in IN_STYLE.findall(css)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed (extra docs)")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_every_page_has_its_place_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert re.search(rf"[-:] {re.escape(name)}$", navigation, re.MULTILINE), name


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    num_resources = 0
    for path in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        text = path.read_text()
        urls = urls_in_style(text) if path.suffix == ".css" else Resources(text).urls
        assert [url for url in urls if ELSEWHERE.match(url)] == [], path
        num_resources += len(urls)
    assert num_resources > 100


@pytest.mark.parametrize(
    "markup",
    [
        '<link rel="stylesheet" href="https://fonts.example/a.css">',
        '<link rel="preconnect" href="//fonts.example">',
        '<script src="http://example.com/a.js"></script>',
        '<style>@import "https://example.com/a.css";</style>',
        '<p style="background: url(https://example.com/a.png)">',
    ],
)
def test_what_a_browser_would_load_is_found(markup: str) -> None:
    assert any(ELSEWHERE.match(url) for url in Resources(markup).urls)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The file of each link in a page, and the section or nothing."""
    for target, section in LINK.findall(page.read_text()):
        yield (page.parent / target if target else page).resolve(), section


def test_the_links_of_the_readme_lead_to_files_and_sections(site: Path) -> None:
    found = list(links(ROOT / "README.md"))
    assert found
    for path, section in found:
        assert path.exists(), path
        if section:
            page = site / path.relative_to(ROOT / "docs").with_suffix(".html")
            assert section in Resources(page.read_text()).ids, f"{path}#{section}"
