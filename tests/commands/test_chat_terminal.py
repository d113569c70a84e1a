"""`minisrv chat` in a real terminal, with a real server and the demo model."""

from __future__ import annotations

import json
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import PYTHONPATH, ServerProcess, wait_until
from tests.support.terminal import Terminal, terminal

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux here")

SUM = "What is 58 + 67?"
ANSWER = "so 58 + 67 = 125"
FIGURES = r"tokens, first token after [\d.]+ s, then [\d.]+ tokens/s, \d+ of \d+ prompt tokens"


@pytest.fixture
def chat(demo_server: ServerProcess, tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "minisrv", "chat", demo_server.url]
    variables = {"PYTHONPATH": PYTHONPATH, "XDG_CACHE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    with terminal(command, variables) as opened:
        opened.wait_for(r"^demo at http://127.0.0.1:\d+/v1$")
        yield opened


def ask(chat: Terminal, text: str) -> None:
    chat.type(text)
    chat.press("Enter")


def stream_long(chat: Terminal) -> None:
    """Begin an answer that takes many seconds, and wait for its first words."""
    ask(chat, "/set ignore_eos true")
    ask(chat, "/set max_tokens 1200")
    chat.wait_for("max_tokens 1200")
    ask(chat, SUM)
    chat.wait_for("so 58")


def running_requests(server: ServerProcess) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(r"^minisrv:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_conversation_with_commands(chat: Terminal, tmp_path: Path) -> None:
    ask(chat, "My name is Ana.")
    screen = chat.wait_for(FIGURES)
    assert "Nice to meet you, Ana!" in screen
    ask(chat, "What is my name?")
    chat.wait_for("Your name is Ana.")
    chat.wait_for(rf"(?s){FIGURES}.*{FIGURES}")
    ask(chat, "/set temperature 0.5")
    ask(chat, "/set")
    chat.wait_for("^temperature 0.5")
    ask(chat, "/set seed")
    ask(chat, "/system Be brief.")
    ask(chat, f"/save {tmp_path / 'chat.json'}")
    chat.wait_for("saved as")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved["messages"]] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert saved["messages"][2]["content"] == "Nice to meet you, Ana!"
    assert saved["temperature"] == 0.5
    ask(chat, "/stats")
    chat.wait_for(r"^ 2 +\d+ +\d+ +\d+ +[\d.]+ s +[\d.]+")
    ask(chat, "/nonsense")
    chat.wait_for("there is no /nonsense")
    (tmp_path / "taken").write_text("mine")
    ask(chat, f"/save {tmp_path / 'taken'}")
    chat.wait_for("exists and is left as it is")
    assert (tmp_path / "taken").read_text() == "mine"
    ask(chat, "/save ~no-such-user/chat.json")
    chat.wait_for("chat.json cannot be written")
    ask(chat, "/clear")
    ask(chat, "/exit")
    chat.wait_for("^status 0")
    history = tmp_path / "minisrv" / "chat_history"
    assert "+What is my name?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_answer_and_not_the_shell(
    chat: Terminal, demo_server: ServerProcess
) -> None:
    stream_long(chat)
    chat.press("C-c")
    chat.wait_for("^stopped")
    wait_until(lambda: running_requests(demo_server) == 0)
    ask(chat, "/set ignore_eos")
    ask(chat, "My name is Ana.")
    chat.wait_for(FIGURES)
    chat.type("half a question")
    chat.press("C-c")
    chat.press("C-d")
    chat.wait_for("^status 0")


def test_what_is_typed_while_an_answer_streams_is_the_next_question(chat: Terminal) -> None:
    stream_long(chat)
    ask(chat, "/set ignore_eos")
    chat.resize("50x20")
    chat.type("My name is")
    assert "My name is" not in chat.screen
    chat.press("C-c")
    chat.wait_for("^stopped")
    chat.wait_for("^> My name is")
    ask(chat, " Ana.")
    chat.wait_for(FIGURES)


@pytest.mark.soak
def test_a_paste_of_200_lines_is_one_message_also_while_an_answer_streams(
    chat: Terminal, tmp_path: Path
) -> None:
    lines = "\n".join(f"row {number}" for number in range(200))
    ask(chat, "/set max_tokens 4")
    chat.paste(lines)
    chat.wait_for(r"^\.\.\. row 199")
    chat.press("Enter")
    chat.wait_for("4 tokens")
    stream_long(chat)
    ask(chat, "/set max_tokens 4")
    chat.paste(lines)
    chat.press("C-c")
    chat.wait_for(r"(?s)^stopped.*^\.\.\. row 199")
    chat.press("Enter")
    chat.wait_for("(?s)^stopped.*^4 tokens")
    ask(chat, f"/save {tmp_path / 'chat.json'}")
    wait_until((tmp_path / "chat.json").exists)
    saved = json.loads((tmp_path / "chat.json").read_text())
    asked = [m["content"] for m in saved["messages"] if m["role"] == "user"]
    assert asked == [lines, SUM, lines]


def test_several_lines_wide_characters_and_another_size(chat: Terminal, tmp_path: Path) -> None:
    chat.type("日本語 🙂")
    chat.press("M-Enter")
    chat.resize("30x12")
    ask(chat, SUM)
    chat.wait_for(r"125")
    chat.resize("100x30")
    ask(chat, f"/save {tmp_path / 'chat.json'}")
    wait_until((tmp_path / "chat.json").exists)
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["messages"][0]["content"] == f"日本語 🙂\n{SUM}"
