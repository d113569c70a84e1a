"""What a server draws on a terminal, and that it draws nowhere else."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from typing_extensions import Buffer

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.console import Console, meter, openai_variables
from minisrv.frontend.registry.status_line import StatusLine
from minisrv.launch_server import main
from minisrv.supervision.records import StartProgress
from minisrv.terminal_line import ERASE, TerminalLine, _in_foreground
from tests.support.hub_server import REPOSITORY, serve_hub
from tests.support.scripted_backend import stats
from tests.support.server_process import PYTHONPATH, WITH_HASH_ENGINE, wait_until
from tests.support.terminal import Terminal, terminal

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux here")
STATUS = r"\d+ running, \d+ waiting \| [\d.-]+ tokens/s \| cache hits [\d%-]+ \| \d+ of \d+ pages"
# Whole lines, as programs and people read them.
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \w+ +(INFO|WARNING) .*")


class Pty:
    """A terminal of 60 columns in place of stderr; this process draws on it as a server would."""

    def __init__(self) -> None:
        self._ours, self._theirs = pty.openpty()
        self.stderr = open(self._theirs, "w")  # noqa: SIM115

    def read(self) -> str:
        """What was drawn so far: all up to a mark that is written now."""
        read = b""
        os.write(self._theirs, b"\0")
        while not read.endswith(b"\0"):
            read += os.read(self._ours, 65536)
        return read[:-1].decode().replace("\r\n", "\n")

    def close(self) -> None:
        self.stderr.close()
        os.close(self._ours)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pty]:
    opened = Pty()
    monkeypatch.setattr("minisrv.terminal_line._in_foreground", lambda owner: True)
    monkeypatch.setattr(log, "_terminal_line", None)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    logger = logging.getLogger("minisrv")
    before = logger.handlers[:], logger.level, logger.propagate
    yield opened
    logger.handlers[:], logger.level, logger.propagate = before
    opened.close()


def set_up(screen: Pty, format: str = "text") -> TerminalLine | None:
    sys.stderr = screen.stderr  # pytest restores its own after the test
    log.setup("test", "info", format, owner=os.getpid())
    return log.terminal_line()


def test_a_log_line_takes_the_place_of_the_drawn_line_which_is_drawn_again_below(
    screen: Pty,
) -> None:
    line = set_up(screen)
    assert line is not None
    assert line.show("half done")
    logging.getLogger("minisrv.x").info("hello")
    text = screen.read()
    assert re.fullmatch(
        re.escape(f"{ERASE}half done{ERASE}") + r"\S+ test +INFO +hello\nhalf done", text
    )
    line.keep()
    assert screen.read() == f"{ERASE}half done\n"
    logging.getLogger("minisrv.x").info("bye")
    assert screen.read().endswith("bye\n")


def test_a_line_is_never_longer_than_the_terminal(
    screen: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = set_up(screen)
    assert line is not None
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((20, 5)))
    line.show("x" * 50)
    assert screen.read() == ERASE + "x" * 19


@pytest.mark.parametrize(
    ("variable", "value", "format"),
    [("NO_COLOR", "1", "text"), ("TERM", "dumb", "text"), ("TERM", "xterm", "json")],
)
def test_what_is_to_be_plain_stays_plain(
    variable: str, value: str, format: str, screen: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert set_up(screen, format) is None
    line = StatusLine()
    for second in range(0, 21, 10):
        line.take(stats(steps=second), float(second))
    text = screen.read()
    assert text.count("status") == 2
    assert "\x1b" not in text
    assert "\r" not in text


def test_a_pipe_stays_plain(screen: Pty, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("test", owner=os.getpid())  # pytest captures stderr
    assert log.terminal_line() is None
    console = Console(ServerConfig(), 80)
    for percent in range(101):
        console.show(StartProgress("load weights", percent / 100, 1e6, "B"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("s  ")[1] for line in lines] == [
        f"load weights {percent}%" for percent in (0, 25, 50, 75, 100)
    ]


def test_a_line_is_written_whole(screen: Pty, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []

    class Raw(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Buffer) -> int:
            writes.append(bytes(data))
            return len(writes[-1])

    unbuffered = io.TextIOWrapper(Raw(), encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", unbuffered)
    Console(ServerConfig(model="m"), 80).announce()
    monkeypatch.setattr(sys, "stderr", unbuffered)
    assert main(["--model", "nowhere/at/all"]) == 2
    assert [data.count(b"\n") for data in writes] == [1, 1, 1], writes


def test_a_job_in_the_background_draws_nothing(
    screen: Pty, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = set_up(screen)
    assert line is not None
    monkeypatch.setattr("minisrv.terminal_line._in_foreground", lambda owner: False)
    assert not line.show("x")
    line.erase()
    assert screen.read() == ""
    logging.getLogger("minisrv.x").info("hello")
    assert re.fullmatch(r"\S+ test +INFO +hello\n", screen.read())
    assert not _in_foreground(os.getpid()) or os.isatty(0)


def test_the_status_shows_the_rate_of_the_last_seconds(screen: Pty) -> None:
    set_up(screen)
    line = StatusLine()
    for second in range(8):
        figures = {"output_tokens": second**2, "prompt_tokens": 200, "cached_tokens": 50}
        line.take(stats(steps=second, **figures), float(second))
    # From second 4 to second 7.
    assert screen.read().endswith(
        f"{ERASE}3 running, 2 waiting | 11.0 tokens/s | cache hits 25% | 5 of 20 pages in use"
    )
    line.take(stats(steps=8, running=0, waiting=0), 8.0)
    assert screen.read() == f"{ERASE}idle | cache hits 40% | 5 of 20 pages in use"


def test_progress_has_a_rate_and_the_time_left() -> None:
    half = StartProgress("load weights", 0.5, 1e8, "B")
    assert meter(half, 0.0, 5.0).startswith("load weights:  50%|#")
    assert meter(half, 0.0, 5.0).endswith("| 50.0M/100M [00:05<00:05, 10.0MB/s]")
    # What an earlier run had downloaded does not count in the rate.
    assert meter(half, 0.4, 5.0).endswith("| 50.0M/100M [00:05<00:25, 2.00MB/s]")
    graphs = StartProgress("record graphs", 0.25, 40, "graph")
    assert meter(graphs, 0.0, 5.0).endswith("| 10.0/40.0 [00:05<00:15, 2.00graph/s]")
    compiling = StartProgress("compile cpu.cpp", 0.5, 15, "s")
    assert meter(compiling, 0.0, 7.4) == (
        "compile cpu.cpp, once on this machine: 7 s of about 15 s"
    )
    assert meter(StartProgress("import torch", 0.0), 0.0, 1.0) == "import torch"
    assert meter(StartProgress("warm-up", 1.0), 0.0, 1.0) == "warm-up 100%"


def test_the_line_for_openai_clients_has_a_key_where_one_is_needed() -> None:
    assert openai_variables(ServerConfig(), "http://x:1") == (
        "export OPENAI_BASE_URL=http://x:1/v1 OPENAI_API_KEY=none"
    )
    assert "YOUR_KEY" in openai_variables(ServerConfig(api_key=("secret",)), "http://x:1")


@pytest.fixture
def server(model_dir: Path, tmp_path: Path, gate: Path) -> Iterator[Terminal]:
    """One that downloads its model first."""
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    files["model.safetensors"] = bytes(2**20)
    command = [sys.executable, "-c", WITH_HASH_ENGINE, "--port", "0", "--model", REPOSITORY]
    variables = {"PYTHONPATH": PYTHONPATH, "NO_COLOR": "", "MINISRV_TEST_STEP_S": "0.02"}
    variables["MINISRV_TEST_GATE"] = str(gate)
    with serve_hub(files) as hub:
        variables |= {"TMPDIR": str(tmp_path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
        with terminal(command, variables, "100x40") as shown:
            shown.wait_for("ready after")
            yield shown


def scheduler_of(tmp_path: Path) -> psutil.Process:
    """That of the server with this folder for its files."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_scheduler = process.cmdline()[-1:] == ["tests.support.hash_scheduler"]
            if is_scheduler and process.environ().get("TMPDIR") == str(tmp_path):
                return process
    raise AssertionError("there is no scheduler")


@needs_tmux
def test_a_server_in_a_terminal(server: Terminal, tmp_path: Path, gate: Path) -> None:
    """One line for each phase, one for the load, and every line of the log by itself."""
    screen = server.wait_for(r"^ +sampling ")
    assert len(re.findall(r"^ +[\d.]+ s  weights: 100%\|#+\| 1\.05M/1\.05M \[", screen, re.M)) == 1
    assert len(re.findall("weights", screen)) == 1
    assert len(re.findall(r"^ +[\d.]+ s  download: 100%\|#+\| .*B/s\]$", screen, re.M)) == 1
    assert "Fetching" not in screen  # the hub's own bars
    found = re.search(r"^  page +(http://\S+)/$", screen, re.M)
    assert found
    url = found[1]
    assert f"  openai    export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none" in screen
    body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as reply:
        shown = server.wait_for(STATUS)
        assert re.search(STATUS, shown.rstrip().splitlines()[-1])
        for _ in reply.iter_lines():
            pass
    server.wait_for(r"^idle \| cache hits ")
    lines = server.wait_for("POST /v1/completions").rstrip().splitlines()
    after = lines[next(i for i, text in enumerate(lines) if " started id=" in text) :]
    assert after[-1].startswith("idle | ")
    assert all(LOG_LINE.fullmatch(text) for text in after[:-1])
    gate.unlink()
    scheduler_of(tmp_path).kill()
    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    httpx.get(f"{url}/v1/models")
    assert "idle" not in server.wait_for("GET /v1/models")
    gate.touch()
    server.wait_for("^all processes serve again$")
    server.press("C-c")
    screen = server.wait_for("^status 0$")
    assert "stopping: open requests have 30 s to end" in screen
    assert "idle" not in screen


@needs_tmux
def test_a_server_that_a_shell_runs_in_the_background(model_dir: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WITH_HASH_ENGINE)
    serve = f"{sys.executable} {program} --port 0 --model {model_dir}"
    command = ["bash", "-c", f"set -m; {serve} & echo pid $!; wait"]
    variables = {"PYTHONPATH": PYTHONPATH, "TMPDIR": str(tmp_path), "NO_COLOR": ""}
    with terminal(command, variables, "100x40") as shown:
        screen = shown.wait_for(r"^  page +(http://\S+)/$")
        assert re.search(r"weights 50%$", screen, re.M)
        found, pid = re.search(r"page +(http\S+)/$", screen, re.M), re.search(r"pid (\d+)", screen)
        assert found
        assert pid
        body = {"prompt": "x", "max_tokens": 5}
        assert httpx.post(f"{found[1]}/v1/completions", json=body).status_code == 200
        screen = shown.wait_for("POST /v1/completions")
        assert "pages in use" not in screen
        os.kill(int(pid[1]), signal.SIGTERM)
        shown.wait_for("^status 0$")
