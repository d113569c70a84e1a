"""The server that `minisrv chat MODEL` starts for itself, and ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from minisrv.config import ENV_PREFIX
from minisrv.errors import MinisrvError
from minisrv.supervision.child_main import PR_SET_PDEATHSIG

_END_S = 15
_LISTENS, _READY = re.compile(r"listens on (\S+),"), re.compile(r"ready after ")
# What another server on this machine may have for itself: certificates, and ports to listen at.
_NOT_PASSED_ON = (
    *("SSL_CERTFILE", "SSL_KEYFILE"),
    *("KV_EVENTS_ENDPOINT", "KV_EVENTS_REPLAY_ENDPOINT"),
)
_LOG_LINES = 10  # of the server that are shown if it fails


@contextlib.contextmanager
def own_server(
    model: str, arguments: Sequence[str], report: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """URL and key of a server that is ready, ended with the context. Raises MinisrvError.

    arguments: further options of the server. report: is called with each line of its start.
    """
    key = secrets.token_urlsafe(24)
    command = [sys.executable, "-m", "minisrv.launch_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", "0", "--drain-timeout", "1", *arguments]
    environment = {**os.environ, f"{ENV_PREFIX}API_KEY": key, "PYTHONUNBUFFERED": "1"}
    for name in _NOT_PASSED_ON:
        environment.pop(ENV_PREFIX + name, None)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            # Ctrl-C in the terminal is for the shell only.
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            yield _wait_until_ready(process, log, report), key
        finally:
            _end(process)


def _wait_until_ready(
    process: subprocess.Popen[str], log: IO[str], report: Callable[[str], None]
) -> str:
    """The URL. The pipe stays open and takes the few lines that the server may still print."""
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        report(line.strip())
        if found := _LISTENS.search(line):
            url = found[1]
        if _READY.match(line):
            return url
    process.wait()
    log.seek(0)
    said = "".join(log.readlines()[-_LOG_LINES:]).strip()
    raise MinisrvError(f"the server did not start (status {process.returncode})\n{said}")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _end_with_parent() -> None:
    """Between fork and exec: have Linux end the server when this process dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
