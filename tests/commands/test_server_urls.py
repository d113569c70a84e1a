"""Commands that talk to a server: which URLs and keys they take, and what may answer there."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from minisrv.commands import cli
from minisrv.errors import ConfigError
from minisrv.option_values import authorization, read_server_url
from tests.support.http_server import serve
from tests.support.paced_server import paced_server

COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "bench": lambda url: ["bench", "--url", url],
    "chat": lambda url: ["chat", url, "-q", "hi"],
    "launch": lambda url: ["launch", "codex", "--url", url],
    "simulate": lambda url: ["simulate", "--calibrate", url, "--step-times", "new.json"],
}
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(autouse=True)
def no_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO()))
    monkeypatch.chdir(tmp_path)


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """The URL of a server that writes `data` to whatever it is sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(2**16)
                    connection.sendall(data)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@every_command
@pytest.mark.parametrize("url", ["http://127.0.0.1:80x", "http://[::1", "http://h:99999"])
def test_a_url_that_no_request_can_be_sent_to_is_refused(
    command: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(COMMANDS[command](url)) == 2
    assert f"{url} is not the URL of a server" in capsys.readouterr().err


@every_command
@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n\xff\xfe\x00",
        b"HTTP/1.0 302 Found\r\nLocation: http://[\r\n\r\n",
        b"",
    ],
)
def test_what_is_not_a_server_of_this_api_is_reported(
    command: str, answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(answer) as url:
        assert cli.main(COMMANDS[command](url)) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("minisrv: ")
    assert url in printed


def test_a_server_without_models_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b'HTTP/1.0 200 OK\r\n\r\n{"data": []}') as url:
        assert cli.main(COMMANDS["launch"](url)) == 1
    assert "it names no model" in capsys.readouterr().err


def test_a_server_without_a_prefix_cache_is_not_calibrated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = b'HTTP/1.0 200 OK\r\n\r\n{"config": {"radix_cache": false}, "vocab_size": 1000}'
    with answering(answer) as url:
        assert cli.main(COMMANDS["simulate"](url)) == 1
    assert f"{url} runs with --no-radix-cache" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "launch", "simulate"])
def test_a_redirect_is_reported_and_gets_no_key(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINISRV_API_KEY", "sk-1")
    with answering(b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/v1\r\n\r\n") as url:
        assert cli.main(COMMANDS[command](url)) == 1
    assert "it redirects to http://127.0.0.1:1/v1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "dashboard", "simulate"])
def test_output_that_nobody_reads_ends_a_command_quietly(command: str) -> None:
    Path("trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,8,2\n")
    pipe, wrapped = subprocess.PIPE, "from minisrv.commands.cli import main; sys.exit(main())"
    with paced_server(0.0, 0.001) as server:
        arguments = {
            "bench": ["--url", server.url, "--requests", "1", "--output-tokens", "2"],
            "dashboard": [],
            "simulate": ["demo", "--gpu", "H100", "--trace", "trace.csv", "--sweep", "replicas=1"],
        }
        call = [sys.executable, "-c", f"import sys; {wrapped}", command, *arguments[command]]
        with subprocess.Popen(call, stdout=pipe, stderr=pipe) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdout.close()
            printed = running.stderr.read().decode()
    assert "minisrv: " not in printed
    assert "Traceback" not in printed
    assert command == "bench" or not printed  # bench shows its progress there
    assert running.returncode == 128 + signal.SIGPIPE


def test_no_proxy_is_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with serve() as server:
        assert cli.main(COMMANDS["launch"](server.url)) == 0


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://host:0",
        "http://user@host",
        "http://host/?a=b",
        "http://host/a b",
        "http://host\n",
        f"http://{'a' * 64}",
    ],
)
def test_these_are_not_urls_of_servers(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a server"):
        read_server_url(url)


def test_urls_of_servers() -> None:
    for url in ("http://127.0.0.1:8000", "https://[::1]/v1", "http://host.example/llm"):
        assert read_server_url(f"{url}/") == url


def test_a_key_is_sent_without_the_line_break_of_its_file() -> None:
    assert authorization("sk-1\n") == {"Authorization": "Bearer sk-1"}
    assert authorization("") == {}
    for key in ("a\nb", "a\r\nHost: b", "\N{SNOWMAN}"):
        with pytest.raises(ConfigError, match="characters that no HTTP header may contain"):
            authorization(key)
