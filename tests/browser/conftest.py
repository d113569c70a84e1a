"""Chromium over the page. Skipped where it or playwright is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.browser.chat_page import ChatPage
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel
from tests.support.server_process import ServerProcess, running, write_model_dir

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
STEP_S = 0.02


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Ends with its module: while it runs, so does an event loop, and asyncio.run fails."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    # Chromium refuses to sandbox itself as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Opens pages; at the end none of them may have failed or asked another machine."""
    contexts = []
    faults: list[str] = []

    def note_request(request: Any) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.hostname not in ("127.0.0.1", "localhost"):
            faults.append(f"a request to {request.url}")

    def open_page(url: str, **options: Any) -> ChatPage:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = chromium.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        context.on("request", note_request)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(f"an error: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"a dialog: {dialog.message}"))
        page.goto(url)
        return ChatPage(page)

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is missing, the scheduler of `engine` does not become ready."""
    path = tmp_path_factory.mktemp("gate") / "open"
    path.touch()
    return path


@pytest.fixture(scope="module")
def engine(gate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A whole server whose model says a hash for each token, slowly enough to be stopped."""
    model_dir = write_model_dir(tmp_path_factory.mktemp("models") / "bytes")
    socket_dir = tmp_path_factory.mktemp("s") / "t"
    arguments = ("--model", str(model_dir), "--restart-limit", "9/60")
    options = {"step_s": STEP_S, "gate": gate, "check": False}
    with running(*arguments, tmp_dir=socket_dir, **options) as server:
        yield server


@pytest.fixture(scope="module")
def played() -> Iterator[HttpServer]:
    """A server whose model says what a test sets as `played.backend.text`."""
    with serve(make_backend=lambda registry: PlayedModel(registry, TEMPLATES["hermes"])) as server:
        yield server


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, which finds faults of accessibility."""
    return (Path(__file__).parent / "axe.min.js").read_text()
