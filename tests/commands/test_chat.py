"""`minisrv chat` without a terminal: questions, pipes, failures, and what reaches the screen."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, StringIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from minisrv.commands import chat, cli
from minisrv.commands.chat_client import Answer, ChatClient, ChatError
from minisrv.commands.chat_shell import Conversation, Screen
from minisrv.commands.chat_text import MarkdownStyle, printable
from minisrv.errors import ConfigError
from tests.support.server_process import ServerProcess, environment, wait_until

SUM = "What is 58 + 67?"
ANSWER = "8 + 7 = 15, 5 + 6 + 1 = 12, so 58 + 67 = 125\n"


def run_chat(
    *arguments: str, piped: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minisrv", "chat", *arguments],
        input=piped,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


@contextmanager
def scripted(events: list[str], status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a server that answers every request with these lines, and the bodies it got."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write("".join(f"{event}\n\n" for event in events).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chunk(**delta: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}"


def shown(url: str, *, is_terminal: bool) -> str:
    console = Console(file=StringIO(), force_terminal=is_terminal, highlight=False)
    conversation = Conversation(turns=[{"role": "user", "content": "hi"}])
    Screen(console).show(ChatClient(url, model="m"), conversation, Answer())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives this process a text on stdin."""

    def give(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(text.encode())))

    return give


def test_a_piped_text_comes_before_the_question(
    demo_server: ServerProcess, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_chat(f"{demo_server.url}/v1", piped=f"{SUM}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER, "")
    pipe("")
    assert cli.main(["chat", demo_server.url, "-q", SUM]) == 0
    assert capsys.readouterr().out == ANSWER
    pipe("a\nb\n")
    with scripted([chunk(content="yes"), "data: [DONE]"]) as (url, bodies):
        command = ["chat", url, "--model", "m", "--system", "Be brief.", "-q", "And?"]
        assert cli.main(command) == 0
    assert capsys.readouterr().out == "yes\n"
    assert bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb\n\nAnd?"},
    ]


def test_without_a_question_or_a_server_it_says_what_to_do(
    pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("")
    assert cli.main(["chat", "http://127.0.0.1:1"]) == 2
    assert "give one with -q" in capsys.readouterr().err
    assert cli.main(["chat", "http://127.0.0.1:1", "-q", "hi"]) == 1
    assert "no server answers at http://127.0.0.1:1/v1: " in capsys.readouterr().err


def processes_with(tmp_path: Path) -> list[psutil.Process]:
    """Those whose temporary folder this is."""
    found = psutil.process_iter(["environ"])
    return [p for p in found if (p.info["environ"] or {}).get("TMPDIR") == str(tmp_path)]


OF_SERVER = ["--", "--num-threads", "1", "--kv-memory", "64MiB", "--dtype", "float32"]


def test_a_server_of_its_own_is_ended_with_it(tmp_path: Path) -> None:
    """Its key is not that of the environment, and its options are passed on."""
    variables = {"MINISRV_PORT": "1", "TMPDIR": str(tmp_path), "MINISRV_API_KEY": "of-another"}
    variables |= {"MINISRV_KV_EVENTS_ENDPOINT": "ipc:///no/such/folder/events"}
    done = run_chat("demo", "-q", SUM, *OF_SERVER, **variables)
    assert (done.returncode, done.stdout) == (0, ANSWER), done.stderr
    assert not list(tmp_path.iterdir())
    assert not processes_with(tmp_path)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_server_of_its_own_is_ended_when_the_shell_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minisrv", "chat", "demo", "-q", SUM, *OF_SERVER]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment(TMPDIR=str(tmp_path)),
    ) as shell:
        wait_until(lambda: len(processes_with(tmp_path)) >= 4)
        shell.kill()
    wait_until(lambda: not processes_with(tmp_path), 30)
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_start_is_reported_with_its_reason(
    pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("")
    assert cli.main(["chat", "no/such/model/here", "-q", "hi"]) == 1
    assert "no such directory or file" in capsys.readouterr().err


def test_sigterm_leaves_a_terminal_that_shows_what_is_typed() -> None:
    """Also while an answer arrives."""
    terminal, window = pty.openpty()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        shell = subprocess.Popen(
            [sys.executable, "-m", "minisrv", "chat", url, "--model", "m", "-q", "hi"],
            stdin=window,
            stdout=window,
            stderr=window,
            env=environment(),
        )
        with silent.accept()[0]:  # stays open: the answer never ends
            assert not shows_typing(window)
            shell.terminate()
            assert shell.wait(30) == 128 + signal.SIGTERM
    assert shows_typing(window)
    os.close(terminal)
    os.close(window)


def shows_typing(window: int) -> bool:
    return bool(termios.tcgetattr(window)[3] & termios.ECHO)


def test_refusals_and_broken_answers_are_sentences() -> None:
    body = json.dumps({"error": {"message": "no such model"}})
    for events, status, expected in (
        ([body], 404, "status 404: no such model"),
        ([body], 401, "OPENAI_API_KEY"),
        (["<html>"], 502, "status 502"),
        ([chunk(content="a"), f"data: {body}"], 200, "no such model"),
        ([chunk(content="a")], 200, "broke off"),
        (["data: {nonsense"], 200, "broke off"),
    ):
        with scripted(events, status) as (url, _), pytest.raises(ChatError, match=expected):
            shown(url, is_terminal=False)


def test_reasoning_is_shown_on_a_terminal_only() -> None:
    events = [chunk(reasoning="hm"), chunk(reasoning_content="m"), chunk(content="**yes** no")]
    with scripted([*events, "data: [DONE]"]) as (url, _):
        assert shown(url, is_terminal=False) == "**yes** no"
        on_terminal = shown(url, is_terminal=True)
    assert "\x1b[2mhm\x1b[0m" in on_terminal
    assert "\x1b[1myes**\x1b[0m no" in on_terminal


def test_a_terminal_obeys_nothing_that_a_model_writes() -> None:
    attack = "a\x1b]52;c;eA==\x07b\x1b[2J\x9bc\r\x08\u202ed\t\n"
    with scripted([chunk(content=attack), "data: [DONE]"]) as (url, _):
        assert shown(url, is_terminal=True) == "a]52;c;eA==b[2Jcd\t\n"
        assert shown(url, is_terminal=False) == attack


@given(st.text(alphabet="a *`#~\n_"), st.lists(st.integers(0, 30)))
def test_styles_keep_every_character_wherever_deltas_end(text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    style, styles = MarkdownStyle(), MarkdownStyle()
    whole = [(c, name) for piece, name in style.feed(text) for c in piece]
    parts = [
        (c, name)
        for begin, end in pairwise(bounds)
        for piece, name in styles.feed(text[begin:end])
        for c in piece
    ]
    assert "".join(c for c, _ in whole) == text
    assert parts == whole


def test_code_headings_and_bold_have_styles() -> None:
    def styles(text: str) -> list[tuple[str, str]]:
        return list(MarkdownStyle().feed(text))

    assert styles("2 ** 3 ** 4") == [("2 ** 3 ** 4", "")]
    assert styles("a `b**c` d") == [("a ", ""), ("`b**c`", "cyan"), (" d", "")]
    assert ("# not a heading", "cyan") in styles("```\n# not a heading\n```\n# one")
    assert styles("```\nx\n```\n# one")[-1] == (" one", "bold")


@pytest.mark.parametrize("url", ["http://", "http://h:port", "http://h:0", "http://h/v1?x=1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a server"):
        ChatClient(url, model="m")


def test_options_of_a_server_need_a_model(
    pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("")
    command = ["chat", "http://127.0.0.1:1", "-q", "x", "--", "--tp", "2"]
    assert cli.main(command) == 2
    assert "need a MODEL" in capsys.readouterr().err


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.delitem(sys.modules, "minisrv.commands.chat_shell")
    assert chat.main(["http://127.0.0.1:1", "-q", "x"]) == 1
    assert "pip install prompt-toolkit rich" in capsys.readouterr().err


def test_printable_keeps_text_of_all_scripts() -> None:
    text = "日本語 \U0001f642 שלום é\u0301 a\tb\nc"
    assert printable(text) == text
