"""Streams that run side by side, and the time between their events; and probes of /health.

It works on raw sockets in one thread, so that the client adds little to what it measures.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

_PROBE = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_PROBE_EVERY_S = 0.01


def request_bytes(path: str, body: bytes, *, close: bool = True) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    return (head + ("Connection: close\r\n" if close else "") + "\r\n").encode() + body


@dataclass
class Waits:
    """Seconds between two events of a stream, and from each probe to its answer."""

    gaps: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)

    @property
    def longest_gap(self) -> float:
        return max(self.gaps)

    @property
    def probe_p99(self) -> float:
        return sorted(self.probes)[int(len(self.probes) * 0.99)]


class StreamWatch:
    """Keeps `num_streams` completions running: one that ends is replaced by another."""

    def __init__(self, url: str, num_streams: int = 16, max_tokens: int = 200) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)
        body = {"prompt": "go on", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        self._request = request_bytes("/v1/completions", json.dumps(body).encode())
        self._num_streams = num_streams
        self._selector = selectors.DefaultSelector()
        self._last_event: dict[socket.socket, float] = {}
        self._waits = Waits()
        self._lock = threading.Lock()
        self._stopped = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> StreamWatch:
        self._thread.start()
        while len(self._last_event) < self._num_streams and self._fault is None:
            time.sleep(0.01)
        self.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped = True
        self._thread.join(10)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def take(self) -> Waits:
        """What was measured since the last call."""
        if self._fault is not None:
            raise self._fault
        with self._lock:
            waits, self._waits = self._waits, Waits()
        return waits

    def watch(self, seconds: float) -> Waits:
        """What is measured in the next seconds."""
        self.take()
        time.sleep(seconds)
        return self.take()

    def post(self, path: str, body: bytes, after_s: float = 0.2) -> tuple[int, bytes, Waits]:
        """Status and body of a response; and what was measured until shortly after it."""
        self.take()
        with socket.create_connection(self._address, timeout=60) as connection:
            connection.sendall(request_bytes(path, body))
            received = b""
            while data := connection.recv(2**20):
                received += data
        time.sleep(after_s)
        head, _, content = received.partition(b"\r\n\r\n")
        return int(head.split()[1]), content, self.take()

    def _run(self) -> None:
        try:
            probe = socket.create_connection(self._address)
            self._selector.register(probe, selectors.EVENT_READ)
            for _ in range(self._num_streams):
                self._open_stream()
            probed_at, is_waiting = 0.0, False
            while not self._stopped:
                if not is_waiting and time.perf_counter() - probed_at > _PROBE_EVERY_S:
                    probed_at, is_waiting = time.perf_counter(), True
                    probe.sendall(_PROBE)
                for key, _ in self._selector.select(_PROBE_EVERY_S):
                    if key.fileobj is not probe:
                        self._read_stream(key.fileobj)  # type: ignore[arg-type]
                        continue
                    data = probe.recv(2**16)
                    assert data, "the probe's connection was closed"
                    if not data.endswith(b'{"status":"ok"}'):
                        continue
                    is_waiting = False
                    with self._lock:
                        self._waits.probes.append(time.perf_counter() - probed_at)
        except BaseException as error:
            self._fault = error

    def _open_stream(self) -> None:
        stream = socket.create_connection(self._address)
        stream.sendall(self._request)
        self._selector.register(stream, selectors.EVENT_READ)

    def _read_stream(self, stream: socket.socket) -> None:
        data = stream.recv(2**16)
        now, last = time.perf_counter(), self._last_event.get(stream)
        if data and last is not None:
            with self._lock:
                self._waits.gaps.append(now - last)
        if data:
            self._last_event[stream] = now
            return
        assert last is not None, "a stream ended before its first event"
        del self._last_event[stream]
        self._selector.unregister(stream)
        stream.close()
        self._open_stream()
