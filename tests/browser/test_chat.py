"""A chat with a whole server: what is shown, kept and sent again, and what survives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.support.server_process import ServerProcess, wait_until


def test_an_answer_is_streamed_with_its_figures_and_survives_a_reload(
    engine: ServerProcess, opened: Any
) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="40", system="Be brief. " * 8)
    chat.send("Tell me a long story")
    chat.wait_for_text()
    assert chat.page.locator("#stop").is_visible()
    chat.wait_for_end()
    stats = chat.stats
    assert stats["cached"] == "0"
    assert int(stats["computed"]) >= len("Tell me a long story")
    assert 0 < int(stats["generated"]) <= 40
    assert float(stats["tokens/s"]) > 1
    assert stats["first token"].endswith("s")
    chat.ask("And then?")
    assert int(chat.stats["cached"]) >= 64  # the pages of the system prompt
    shown = chat.texts
    chat.page.reload()
    chat.page.wait_for_selector(".message")
    assert chat.texts == shown
    assert chat.page.locator("#title").inner_text() == "Tell me a long story"


def test_the_shown_seed_repeats_the_answer(engine: ServerProcess, opened: Any) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="8")
    requests: list[dict[str, Any]] = []
    chat.page.on(
        "request",
        lambda r: requests.append(r.post_data_json) if r.url.endswith("completions") else None,
    )
    chat.ask("One")
    chat.press_button(1, "Answer again")
    chat.wait_for_end()
    first, second = requests
    assert first["seed"] != second["seed"] == int(chat.stats["seed"])
    assert first["messages"] == second["messages"]


def test_stop_keeps_what_has_arrived(engine: ServerProcess, opened: Any) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="1500")
    for stop in (lambda: chat.page.keyboard.press("Escape"), lambda: chat.page.click("#stop")):
        chat.send("Never end")
        chat.wait_for_text()
        stop()
        chat.wait_for_end()
        assert "You stopped this answer." in chat.message(-1).inner_text()
        assert chat.answer
    loads = f"{engine.url}/v1/loads"
    wait_until(lambda: httpx.get(loads).json()["loads"][0]["num_open_reqs"] <= 1)


def test_edits_and_new_answers_are_branches(engine: ServerProcess, opened: Any) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="6")
    chat.ask("First")
    chat.ask("Second")
    before = chat.texts
    chat.press_button(2, "Edit")
    chat.page.get_by_label("Edit the message").fill("Another")
    chat.page.keyboard.press("Enter")
    chat.wait_for_end()
    assert chat.texts[:3] == [*before[:2], "Another"]
    assert "2 / 2" in chat.message(2).inner_text()
    chat.press_button(2, "Branch before")
    assert chat.texts == before
    chat.press_button(3, "Answer again")
    chat.wait_for_end()
    assert "2 / 2" in chat.message(3).inner_text()
    (stored,) = chat.stored
    assert len(stored["messages"]) == 7


def test_an_answer_goes_on_over_the_death_of_the_engine(
    engine: ServerProcess, gate: Path, opened: Any
) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="60", temperature="0")
    prompt = "What is the longest word of all?"
    whole = chat.ask(prompt)
    content = chat.stored[0]["messages"][chat.stored[0]["head"]]["content"]
    assert len(content) > 20
    chat.page.click("#new-chat")
    chat.send(prompt)
    chat.wait_for_text()
    gate.unlink()
    engine.child("scheduler").kill()
    sentence = "A part of the engine is being started again"
    chat.page.locator(".message").get_by_text(sentence).wait_for()
    gate.touch()
    chat.wait_for_end()
    assert chat.answer == whole
    assert chat.page.locator(".note.error:visible").count() == 0
    wait_until(lambda: httpx.get(f"{engine.url}/ready").status_code == 200)


def test_the_tree_shows_the_path_of_this_chat(engine: ServerProcess, opened: Any) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="4")
    chat.ask("The beginning of this chat fills some pages of the cache, so it is in the tree.")
    note = chat.page.locator("#tree-note")
    note.get_by_text("This chat:").wait_for()
    assert "lit" in note.inner_text()
    lit = """() => {
        const canvas = document.getElementById('tree');
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let lit = 0;
        for (let i = 0; i < data.length; i += 4)
            if (data.slice(i, i + 3).join() === '224,118,28') lit += 1;
        return lit;
    }"""
    assert chat.page.evaluate(lit) > 20
    chat.page.locator("#hit-rate", has_text="%").wait_for()
    chat.page.locator("#running", has_text=re.compile("^0$")).wait_for()


def test_chats_are_exported_and_imported(
    engine: ServerProcess, opened: Any, tmp_path: Path
) -> None:
    chat = opened(engine.url)
    chat.set(max_tokens="5", system="A system prompt")
    chat.ask("Keep this")
    with chat.page.expect_download() as download:
        chat.page.click("#export")
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    assert json.loads(path.read_text())["conversations"][0]["title"] == "Keep this"
    other = opened(engine.url)
    with other.page.expect_file_chooser() as chooser:
        other.page.click("#import")
    chooser.value.set_files(path)
    other.page.wait_for_selector(".message")
    assert other.texts == chat.texts
    assert other.stored[0]["system"] == "A system prompt"
    path.write_text("{")
    with other.page.expect_file_chooser() as chooser:
        other.page.click("#import")
    chooser.value.set_files(path)
    other.page.get_by_text("chats.json is not JSON.").wait_for()
