"""Open WebUI as its page says: it is started by the first program, and asked by the second."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.clients.pages import DEFAULT_URL, programs
from tests.clients.running import Machine

WEBUI_URL = "http://127.0.0.1:8080"
START_S = 240


@contextmanager
def started(machine: Machine, source: str, url: str) -> Iterator[None]:
    """The server that a program of the shell starts, until it answers and then to the end."""
    path = machine.work / "server.sh"
    path.write_text(source)
    with (machine.folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["sh", "-e", str(path)],
            cwd=machine.work,
            env=machine.variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_S
            while not answers(f"{url}/health"):
                assert server.poll() is None, (machine.folder / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline, "it does not answer"
                time.sleep(0.5)
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False


@pytest.mark.client("open-webui", "[recipe](open-webui.md)")
def test_open_webui_lists_the_model_and_answers(
    machine: Callable[[str], Machine], demo_url: str
) -> None:
    client = machine("open-webui")
    serve, ask = (program for program in programs() if program.page == "open-webui")
    port = free_port()
    own_url = f"http://127.0.0.1:{port}"
    source = serve.source.replace(DEFAULT_URL, demo_url).replace("--port 8080", f"--port {port}")
    with started(client, source, own_url):
        done = client.program(ask.source.replace(WEBUI_URL, own_url), ask.language)
    assert done.status == 0, str(done)
    assert ask.output is not None
    assert done.stdout == ask.output
