"""A whole server as a child of the test, and checks that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import minisrv
from tests.support.hash_engine import expected_output

ROOT = Path(__file__).parent.parent.parent
# The package that the tests import, which may be a copy with a bug (scripts/seeded_bugs.py).
PYTHONPATH = os.pathsep.join(map(str, (Path(minisrv.__file__).parent.parent, ROOT)))
VOCAB_SIZE = 257
MAX_SEQ_LEN = 2048

# Runs a command with the hash scheduler in place of the torch engine.
WITH_HASH_ENGINE = """
import sys
from minisrv import launch_server
from minisrv.supervision import supervisor
supervisor.MODULES["scheduler"] = "tests.support.hash_scheduler"
sys.exit(launch_server.main())
"""


def write_model_dir(directory: Path) -> Path:
    """Write what every process except the engine reads: a config and a byte-level tokenizer."""
    directory.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    files = {
        "tokenizer_config.json": {"eos_token": "<|end|>", "chat_template": template},
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": MAX_SEQ_LEN,
            "eos_token_id": VOCAB_SIZE - 1,
        },
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value))
    return directory


def environment(**variables: str) -> dict[str, str]:
    """The test's environment with the package and the test modules on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MINISRV_")}
    return {**kept, "PYTHONPATH": PYTHONPATH, **variables}


class ServerProcess:
    """`python -m minisrv.launch_server`, or the same with the hash engine."""

    def __init__(
        self,
        *arguments: str,
        tmp_dir: Path,
        hash_engine: bool = True,
        check: bool = True,
        step_s: float = 0.0,
        gate: Path | str = "",
        grammars: bool = False,
        poisons: bool = False,
    ) -> None:
        program = ["-c", WITH_HASH_ENGINE] if hash_engine else ["-m", "minisrv.launch_server"]
        self.tmp_dir = tmp_dir
        tmp_dir.mkdir()
        self.popen = subprocess.Popen(
            [sys.executable, *program, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(
                MINISRV_TEST_STEP_S=str(step_s),
                MINISRV_TEST_GATE=str(gate),
                MINISRV_TEST_GRAMMARS=str(int(grammars)),
                MINISRV_TEST_POISONS=str(int(poisons)),
                # A check takes time by the page: 0.4 ms here, 40 ms in the cache of a real engine.
                MINISRV_CHECK=str(int(hash_engine and check)),
                TMPDIR=str(tmp_dir),
            ),
            start_new_session=True,
            # Under nohup SIGHUP is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.family: list[psutil.Process] = []

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as stdout:
            self.lines.extend(stdout)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        """The URL it listens on; waits for the line that reports it."""
        wait_until(lambda: "listens on" in self.output or self.popen.poll() is not None)
        match = re.search(r"listens on (\S+),", self.output)
        assert match is not None, self.output
        return match[1]

    def wait_until_ready(self) -> ServerProcess:
        url = self.url
        wait_until(lambda: status_of(f"{url}/ready") == 200 or self.popen.poll() is not None)
        assert self.popen.poll() is None, self.output
        self.family = psutil.Process(self.popen.pid).children(recursive=True)
        return self

    def child(self, kind: str) -> psutil.Process:
        """The process of a kind that runs now."""
        self.family = psutil.Process(self.popen.pid).children(recursive=True)
        modules = (f"minisrv.{kind}", f"tests.support.hash_{kind}")
        (found,) = [process for process in self.family if module_of(process) in modules]
        return found

    def wait(self, timeout_s: float = 60) -> int:
        """The exit status; fails if the process does not exit in time."""
        status = self.popen.wait(timeout_s)
        self._reader.join()
        return status

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=30)
        assert not alive, alive
        assert not list(self.tmp_dir.iterdir())

    def end(self) -> None:
        """For fixtures: kill whatever still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family += psutil.Process(self.popen.pid).children(recursive=True)
        self.popen.kill()
        self.wait()
        psutil.wait_procs(self.family, timeout=30)


def module_of(process: psutil.Process) -> str:
    """The last argument of a process, by which its kind is known; nothing of one that has died."""
    try:
        return "".join(process.cmdline()[-1:])
    except psutil.NoSuchProcess:
        return ""


@contextlib.contextmanager
def running(*arguments: str, tmp_dir: Path, **options: Any) -> Iterator[ServerProcess]:
    """A server that is ready."""
    server = ServerProcess(*arguments, tmp_dir=tmp_dir, **options)
    try:
        yield server.wait_until_ready()
    finally:
        server.end()


class OpenRequest:
    """A completion request that is read in a thread, streamed or not."""

    PROMPT = "go on"

    def __init__(self, url: str, *, stream: bool, max_tokens: int = 1500) -> None:
        self.status: int | None = None
        self.text = ""
        self.error: Exception | None = None
        self._url = url
        self._body = {"prompt": self.PROMPT, "max_tokens": max_tokens, "stream": stream}
        self._body["ignore_eos"] = True
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=self._body, timeout=120
            ) as response:
                self.status = response.status_code
                for piece in response.iter_text():
                    self.text += piece
        except httpx.HTTPError as error:
            self.error = error

    def wait_for_text(self) -> None:
        wait_until(lambda: self.text != "" or self.error is not None)
        assert self.error is None

    def join(self) -> OpenRequest:
        self._thread.join(120)
        assert not self.is_open, "the request hangs"
        return self

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    @property
    def events(self) -> list[str]:
        """The data of a stream, in order."""
        return [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]


def open_requests(
    url: str, *, num_streams: int, num_whole: int, max_tokens: int = 1500
) -> Sequence[OpenRequest]:
    """Requests that are all being served: those that are not streamed came first."""
    whole = [OpenRequest(url, stream=False, max_tokens=max_tokens) for _ in range(num_whole)]
    wait_until(lambda: num_open(url) + sum(not one.is_open for one in whole) >= num_whole)
    streams = [OpenRequest(url, stream=True, max_tokens=max_tokens) for _ in range(num_streams)]
    for stream in streams:
        stream.wait_for_text()
    return [*streams, *whole]


def expected_text(model_dir: Path, num_tokens: int) -> str:
    """What the hash engine answers to an OpenRequest."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    prompt_ids = tokenizer.encode(OpenRequest.PROMPT).ids
    text: str = tokenizer.decode(expected_output(prompt_ids, num_tokens, VOCAB_SIZE))
    return text


def num_open(url: str) -> int:
    """How many requests and queries a server has accepted and not answered."""
    (load,) = httpx.get(f"{url}/v1/loads", timeout=60).json()["loads"]
    return int(load["num_open_reqs"])


@contextlib.contextmanager
def suspended(process: psutil.Process) -> Iterator[psutil.Process]:
    """The process stands still: a scheduler ends no request, a tokenizer answers no query."""
    process.suspend()
    try:
        yield process
    finally:
        process.resume()


def free_port() -> int:
    """One below those that the kernel gives to connections, which could take it before a server."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def status_of(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=30).status_code
    except httpx.HTTPError:
        return None
