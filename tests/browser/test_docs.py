"""/docs in a browser: log in with a key, and "Try it out", also behind a proxy's prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.http_server import HttpServer, serve

KEY = "sesame"
CHAT = "#operations-default-create_chat_completion_v1_chat_completions_post"


@pytest.fixture(scope="module")
def guarded() -> Iterator[HttpServer]:
    with serve(api_key=(KEY,), root_path="/llm") as server:
        yield server


def log_in(page: Any) -> None:
    page.get_by_text("This server needs a key.").wait_for()
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.get_by_text("The server does not know this key.").wait_for()
    page.fill("#key", KEY)
    page.press("#key", "Enter")


@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.soak), "/llm"])
def test_an_example_is_tried_out(opened: Any, guarded: HttpServer, prefix: str) -> None:
    page = opened(f"{guarded.url}{prefix}/docs").page
    log_in(page)
    page.locator(CHAT).click()
    page.locator(CHAT).get_by_role("button", name="Try it out").click()
    with page.expect_response(f"{guarded.url}{prefix}/v1/chat/completions") as caught:
        page.locator(CHAT).get_by_role("button", name="Execute").click()
    assert caught.value.status == 200
    page.locator(CHAT).get_by_text("chat.completion").first.wait_for()
    assert guarded.backend.requests[-1].messages[-1]["content"] == "What is 17 + 25?"


def test_without_a_key_the_api_is_shown_at_once(opened: Any, played: HttpServer) -> None:
    page = opened(f"{played.url}/docs").page
    page.locator(CHAT).wait_for()
    assert not page.locator("#login").is_visible()


def test_redoc_shows_the_api_too(opened: Any, guarded: HttpServer) -> None:
    page = opened(f"{guarded.url}/redoc").page
    log_in(page)
    page.get_by_text("Answer a conversation.", exact=True).first.wait_for()
