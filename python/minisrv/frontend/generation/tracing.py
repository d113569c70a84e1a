"""OpenTelemetry spans of generations, sent to a collector over OTLP.

Needs the packages of the extra `otlp`; nothing else imports this module unless --otlp-endpoint is
given. A thread of the SDK sends the spans in batches from a bounded queue, so that a collector that
is slow or away costs spans and no request waits for it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from minisrv.errors import ConfigError, MinisrvError
from minisrv.frontend.generation.event_reader import Usage
from minisrv.frontend.generation.request import ChatRequest, GenerationRequest
from minisrv.frontend.generation.timings import RequestTimings
from minisrv.frontend.http.context import context_of, session_of

logger = logging.getLogger("minisrv.frontend")

NAME = "minisrv"
TRACES_PATH = "/v1/traces"
LAST_SPANS_S = 1.0  # at the end, to send what is left


class Tracer:
    """Begins the spans of requests."""

    def __init__(self, endpoint: str, version: str) -> None:
        """`endpoint`: of the collector, with or without TRACES_PATH. Raises ConfigError."""
        resource = {"service.version": version}
        named = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        if not named and not os.environ.get("OTEL_SERVICE_NAME"):
            resource["service.name"] = NAME
        self._provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter(_traces_url(endpoint))))
        self._tracer = self._provider.get_tracer(NAME, version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, request: GenerationRequest, scope: Scope, timings: RequestTimings
    ) -> RequestTrace:
        """The span of a request, below that of its `traceparent` header if it has one."""
        parent = self._propagator.extract(Headers(scope=scope))
        attributes = _request_attributes(request, scope)
        name = f"{attributes['gen_ai.operation.name']} {request.model}"
        epoch_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            name,
            parent,
            trace.SpanKind.SERVER,
            attributes,
            start_time=epoch_ns + _ns(timings.arrived_at),
        )
        return RequestTrace(self._tracer, span, epoch_ns)

    def close(self) -> None:
        """Send the spans that are left, for up to LAST_SPANS_S."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(LAST_SPANS_S)


class RequestTrace:
    """The span of a request, which has children for its phases once it has ended."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, epoch_ns: int) -> None:
        """epoch_ns: the Unix time at which this machine's monotonic clock was 0."""
        self._tracer, self._span, self._epoch_ns = tracer, span, epoch_ns
        context = span.get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id)
        span_id = trace.format_span_id(context.span_id)
        self.traceparent = f"00-{self.trace_id}-{span_id}-{int(context.trace_flags):02x}"

    def end(self, timings: RequestTimings, usage: Usage, error: Exception | None) -> None:
        """Write the phases of the choice that started first, and end the span.

        The scheduler's monotonic clock is that of the frontend: both run on this machine.
        """
        if not self._span.is_recording():
            return
        now = time.monotonic()
        if timings.first is not None:
            start = timings.first.start
            first_step_at = start.at - start.prefill_s
            self._add_phase("queue", first_step_at - start.queue_s, first_step_at)
            self._add_phase("prefill", first_step_at, start.at)
            self._add_phase("decode", start.at, min(now, start.at + timings.decode_s))
        self._span.set_attributes(_reply_attributes(timings, usage))
        if timings.failure_reason is not None:
            self._note_failure(timings.failure_reason, error)
        self._span.end(self._epoch_ns + _ns(now))

    def _add_phase(self, name: str, start_s: float, end_s: float) -> None:
        context = trace.set_span_in_context(self._span)
        child = self._tracer.start_span(name, context, start_time=self._epoch_ns + _ns(start_s))
        child.end(self._epoch_ns + _ns(end_s))

    def _note_failure(self, reason: str, error: Exception | None) -> None:
        """By the conventions for servers, what the client did is not an error of the span."""
        ours = reason == "error"
        if reason == "error" and isinstance(error, MinisrvError):
            reason, ours = error.code or error.error_type, error.http_status >= 500
        elif reason == "error" and error is not None:
            reason = type(error).__name__
        self._span.set_attribute("error.type", reason)
        if ours:
            self._span.set_status(trace.StatusCode.ERROR)


class _Exporter(SpanExporter):  # type: ignore[misc, unused-ignore]  # without the extra
    """Logs when the collector begins and ceases to fail, in place of every failure."""

    def __init__(self, url: str) -> None:
        self._inner = OTLPSpanExporter(url)
        self._host = urlsplit(url).netloc.rpartition("@")[2]
        self._fails = False
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            logger.warning("the collector at %s takes no traces; spans are lost", self._host)
        elif self._fails and not fails:
            logger.info("the collector at %s takes traces again", self._host)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call, unused-ignore]


def _traces_url(endpoint: str) -> str:
    try:
        url = urlsplit(endpoint)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"--otlp-endpoint is {endpoint!r}; it must be a URL such as http://localhost:4318"
        )
    path = url.path.rstrip("/")
    return url._replace(path=path if path.endswith(TRACES_PATH) else path + TRACES_PATH).geturl()


def _request_attributes(request: GenerationRequest, scope: Scope) -> dict[str, Any]:
    sampling = request.sampling
    return _known(
        {
            "gen_ai.operation.name": (
                "chat" if isinstance(request, ChatRequest) else "text_completion"
            ),
            "gen_ai.provider.name": NAME,
            "gen_ai.request.model": request.model,
            "gen_ai.request.choice.count": sampling.n if sampling.n != 1 else None,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
            "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
            "gen_ai.request.stream": True if request.reply.stream else None,
            "gen_ai.conversation.id": session_of(scope),
            "http.request.method": scope["method"],
            "http.route": getattr(scope.get("route"), "path", None),
            "minisrv.request_id": context_of(scope).request_id,
        }
    )


def _reply_attributes(timings: RequestTimings, usage: Usage) -> dict[str, Any]:
    reasons = [c.finish_reason for c in timings.choices.values() if c.finish_reason]
    first = timings.first
    return _known(
        {
            "gen_ai.response.finish_reasons": reasons or None,
            "gen_ai.response.time_to_first_chunk": (
                None if first is None else first.started_at - timings.arrived_at
            ),
            "gen_ai.usage.input_tokens": usage.prompt_tokens or None,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
        }
    )


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
