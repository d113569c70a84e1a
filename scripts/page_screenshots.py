"""Take the pictures of the chat page for docs/, in the Chromium of the system.

`scripts/page_screenshots.py [MODEL] [FOLDER]`, by default smollm2 and docs/. Starts a server of its
own, fills its cache with chats that share prefixes, and talks to the model on the page.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
DESKTOP = {"viewport": {"width": 1360, "height": 850}}
PHONE = {
    "viewport": {"width": 390, "height": 780},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
SYSTEMS = [
    "You are a helpful assistant who answers in short sentences and uses Markdown.",
    "You translate from English to French. Answer with the translation only.",
    "You write Python programs. Explain each program in one sentence and show its code in a block.",
    "You are an expert in history who gives dates, names and places for everything that is said.",
]
TOPICS = ["the moon", "a bridge", "bread", "rivers", "the alphabet", "a violin", "tea", "glass"]
# Of those that a model of 135 million parameters has good answers to.
QUESTIONS = [
    "Name three things that people drink in the morning, as a list.",
    "Write a short Python function that adds two numbers.",
]
SETTINGS = {"temperature": "0", "max_tokens": "150", "stop": "However"}
READY_S = 180


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """The URL of a server with the model."""
    command = [sys.executable, "-m", "minisrv.launch_server", "--model", model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if match := re.search(r"listens on (\S+),", line):
                break
        else:
            raise SystemExit("the server did not start")
        # So that the pipe stays empty.
        threading.Thread(target=server.stdout.read, daemon=True).start()
        wait_until_ready(match[1])
        yield match[1]
    finally:
        server.terminate()
        server.wait(30)


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_S
    while httpx.get(f"{url}/ready", timeout=READY_S).status_code != 200:
        if time.monotonic() > deadline:
            raise SystemExit(f"the server is not ready after {READY_S} s")
        time.sleep(0.5)


def fill_cache(url: str) -> None:
    """Chats that share system prompts, and turns of chats that share all before them."""

    def talk(i: int) -> None:
        messages = [{"role": "system", "content": SYSTEMS[i % len(SYSTEMS)]}]
        topic = TOPICS[i // len(SYSTEMS) % len(TOPICS)]
        questions = [f"Tell me about {topic}.", f"What did people say of {topic}?"]
        for question in questions[: 1 + i % 2]:
            messages.append({"role": "user", "content": question + " Be brief." * (i % 3)})
            body = {"messages": messages, "max_tokens": 24, "seed": i, "temperature": 0.8}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
            messages.append(reply["choices"][0]["message"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(talk, range(96)))


def ask(page: Page, question: str) -> None:
    page.fill("#input", question)
    page.press("#input", "Enter")
    page.wait_for_selector("#stop", state="visible")
    page.wait_for_selector("#stop", state="hidden", timeout=180_000)


def begin(browser: Browser, url: str, **options: Any) -> Page:
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.evaluate(
        "(settings) => localStorage.setItem('minisrv.settings', JSON.stringify(settings))",
        SETTINGS,
    )
    page.reload()
    page.click("#open-settings")
    page.fill("#settings [name=system]", SYSTEMS[2])
    page.click("#settings-save")
    return page


def take_pictures(browser: Browser, url: str, folder: Path) -> None:
    page = begin(browser, url, **DESKTOP, color_scheme="light")
    for question in QUESTIONS:
        ask(page, question)
    page.wait_for_timeout(2500)
    page.screenshot(path=folder / "page_light.png")
    page.click("#theme")
    page.evaluate("() => document.getElementById('scroller').scrollTo(0, 0)")
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "page_dark.png")
    page.click("#theme")
    page.click("#engine-wide")
    page.fill("#input", "Explain it step by step.")
    page.press("#input", "Enter")
    page.wait_for_timeout(1600)
    box = page.locator("#tree").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.2)
    page.screenshot(path=folder / "page_tree.png")
    phone = begin(browser, url, **PHONE, color_scheme="light")
    for question in QUESTIONS:
        ask(phone, question)
    phone.screenshot(path=folder / "page_phone.png")


def main(model: str = "smollm2", folder: str = str(DOCS)) -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("there is no Chromium; on Debian: apt-get install chromium")
    with serving(model) as url, sync_playwright() as driver:
        fill_cache(url)
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        take_pictures(browser, url, Path(folder))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
