"""Compiles each new grammar in a process that may die of it, before the scheduler compiles it.

A short grammar can take gigabytes and minutes (llguidance counts only part of its work), and a
failed allocation ends the process. So a helper process, which holds only the vocabulary, forks a
child per grammar with limits on CPU time and memory. A fork takes milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.vocabulary import Vocabulary, VocabularySource
from minisrv.supervision.child_main import PR_SET_PDEATHSIG

logger = logging.getLogger("minisrv.grammar")

_WALL_PER_CPU = 2  # a child is stopped after this many times its CPU time
_START_SECONDS = 60  # for the helper to load the vocabulary
_NICENESS = 5
_REAP_SECONDS = 0.2
_STARTED, _FAILED = b".", b"!"


class Sandbox:
    """Starts its helper process when the first grammar comes. Thread-safe.

    memory_mib: what a child may allocate beyond the helper's own memory.
    """

    def __init__(
        self,
        vocabulary: VocabularySource,
        cpu_seconds: float = 10.0,
        memory_mib: int = 512,
    ) -> None:
        self._vocabulary = vocabulary
        self._cpu_seconds, self._memory_mib = cpu_seconds, memory_mib
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._stop: Callable[[], object] = lambda: None
        self._closed = False

    def try_out(self, grammar: Grammar) -> int:
        """The bytes that compiling the grammar takes, which is within the limits.

        Raises InvalidRequestError if it is wrong or exceeds them, MinisrvError if that could not be
        found out.
        """
        for _ in range(2):  # the helper may have been killed since the last grammar, or during it
            reply = self._ask(grammar)
            if reply in (b"", _STARTED) and self._helper_has_ended():
                continue
            if reply.startswith(_STARTED):
                return self._judge(grammar, reply[len(_STARTED) :])
        raise MinisrvError("the grammar could not be tried out", code="grammar_not_compiled")

    def _helper_has_ended(self) -> bool:
        """Whether the helper was killed. Its children are killed after it, but reaped sooner."""
        with self._lock:
            helper = self._helper
        if helper is None:
            return False
        try:
            helper.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the helper and its children."""
        with self._lock:
            self._closed = True
            self._stop()

    def _ask(self, grammar: Grammar) -> bytes:
        """What the child wrote; nothing if the helper died before it started a child."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._send(theirs)
            ours.settimeout(_START_SECONDS + _WALL_PER_CPU * self._cpu_seconds)
            try:
                ours.sendall(json.dumps(asdict(grammar)).encode())
                ours.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: ours.recv(2**16), b""))
            except OSError as error:
                logger.warning("trying out a grammar failed: %s", error)
                return b""

    def _send(self, connection: socket.socket) -> None:
        """Hand the child's end of a connection to the helper, which is started if need be."""
        with self._lock:
            if self._closed:
                raise MinisrvError("the engine is closing")
            try:
                self._requests = self._requests or self._start()
                socket.send_fds(self._requests, [b"x"], [connection.fileno()])
            except OSError:  # the helper has been killed
                self._stop()
                self._requests = self._start()
                socket.send_fds(self._requests, [b"x"], [connection.fileno()])

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._helper = helper = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the server, which then closes its end. Not a session of its own:
                # Linux may give each session an equal share of the processors.
                process_group=0,
            )
        self._stop = weakref.finalize(self, _end, helper, ours)
        settings = {
            "vocabulary": asdict(self._vocabulary),
            "cpu_seconds": self._cpu_seconds,
            "memory_mib": self._memory_mib,
        }
        assert helper.stdin is not None
        with helper.stdin as stdin:
            stdin.write(json.dumps(settings).encode())
        return ours

    def _judge(self, grammar: Grammar, verdict: bytes) -> int:
        if not verdict:
            raise InvalidRequestError(
                f"{grammar.param} takes more than {self._cpu_seconds:g} s or "
                f"{self._memory_mib} MiB to compile; use a smaller grammar",
                param=grammar.param,
            )
        if verdict == _FAILED:
            raise MinisrvError("the grammar could not be compiled")
        error, num_bytes = json.loads(verdict)
        if error is not None:
            raise InvalidRequestError(**error)
        return int(num_bytes)


def _end(helper: subprocess.Popen[bytes], requests: socket.socket) -> None:
    requests.close()
    helper.kill()  # its children die with it
    helper.wait()


def main() -> None:
    """The helper: forks a child for each connection that it gets, until the other end closes."""
    import_module("minisrv.structured_output.checker")  # before the forks, so that none takes long
    settings = json.load(sys.stdin.buffer)
    vocabulary = Vocabulary(VocabularySource(**settings["vocabulary"]))
    vocabulary.load()
    requests = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                requests.close()
                _run_child(connection, vocabulary, settings)


def _run_child(
    connection: socket.socket, vocabulary: Vocabulary, settings: dict[str, Any]
) -> NoReturn:
    from minisrv.structured_output.checker import find_error

    try:
        connection.sendall(_STARTED)
        _limit(settings["cpu_seconds"], settings["memory_mib"])
        request = b"".join(iter(lambda: connection.recv(2**16), b""))
        before = _most_resident()
        error = find_error(_read_grammar(json.loads(request)), vocabulary)
        fields = error and {"message": error.message, "param": error.param, "code": error.code}
        connection.sendall(json.dumps([fields, _most_resident() - before]).encode())
    except MemoryError:
        pass  # no verdict, as when an allocation of llguidance fails
    except Exception:
        traceback.print_exc()
        connection.sendall(_FAILED)
    finally:
        os._exit(0)


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_grammar(fields: dict[str, Any]) -> Grammar:
    return Grammar(**{**fields, "parts": tuple(map(_read_grammar, fields["parts"]))})


def _limit(cpu_seconds: float, memory_mib: int) -> None:
    """Let the kernel kill this process if it exceeds its share."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):  # /proc may be read-only in a container
            Path("/proc/self/oom_score_adj").write_text("1000")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.nice(_NICENESS)
    seconds = math.ceil(cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _WALL_PER_CPU * cpu_seconds)


if __name__ == "__main__":
    main()
