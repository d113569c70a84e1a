"""A small server with the hub's routes for models: info, tree, and files with ranges."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = "org/gated"


@dataclass
class Hub:
    """files: path to bytes, of REPOSITORY at COMMIT, which main and v1 refer to.

    fetched: paths that were downloaded. cut_after: the first download of each file is cut off
    after this many bytes.
    """

    url: str
    files: dict[str, bytes]
    fetched: list[str] = field(default_factory=list)
    cut_after: int | None = None


@contextlib.contextmanager
def serve_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub on a free port with the `files` of REPOSITORY."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{GATED}"):
            self._error(403, "GatedRepo", "Access to this model is restricted")
        elif match := re.fullmatch(rf"/api/models/{REPOSITORY}(?:/revision/([^/]+))?", path):
            self._answer_info(match[1])
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            self._json([self._entry(name) for name in self.hub.files])
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/{COMMIT}/(.+)", path):
            self._answer_file(match[1])
        else:
            self._error(404, "RepoNotFound", "Repository not found")

    do_HEAD = do_GET

    def _answer_info(self, revision: str | None) -> None:
        if revision not in (None, "main", "v1", COMMIT):
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return
        siblings = [{"rfilename": name} for name in self.hub.files]
        self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})

    def _entry(self, name: str) -> dict[str, object]:
        data = self.hub.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}

    def _answer_file(self, name: str) -> None:
        data = self.hub.files[name]
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after is not None and name not in self.hub.fetched
        self.hub.fetched.append(name)
        self.wfile.write(data[start : self.hub.cut_after if cut else None])
        self.close_connection = cut

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _oid(data: bytes) -> str:
    """The name that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
