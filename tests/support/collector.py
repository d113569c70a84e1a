"""A collector of traces: takes OTLP over HTTP, read by OpenTelemetry's own types."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass
class Collector:
    """status: of its replies. paths, requests: what it got. answers: cleared to let it hang."""

    url: str = ""
    status: int = 200
    answers: threading.Event = field(default_factory=threading.Event)
    paths: list[str] = field(default_factory=list)
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, name: str, count: int = 1) -> list[Any]:
        """The spans of that name, once there are so many; sent in batches, after the reply."""
        deadline = time.monotonic() + 30
        while len(found := [span for span in self.spans if span.name == name]) < count:
            assert time.monotonic() < deadline, f"{len(found)} spans {name!r} have arrived"
            time.sleep(0.01)
        return found

    def children(self, span: Any) -> dict[str, Any]:
        return {one.name: one for one in self.spans if one.parent_span_id == span.span_id}


def plain(attributes: Any) -> dict[str, Any]:
    """The values of a span or a resource."""
    return {one.key: _plain(one.value) for one in attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return getattr(value, kind)


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    collected = Collector()
    collected.answers.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collected.paths.append(self.path)
            collected.answers.wait()
            if collected.status == 200:
                collected.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(collected.status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        collected.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield collected
        finally:
            collected.answers.set()
            server.shutdown()
            thread.join()
