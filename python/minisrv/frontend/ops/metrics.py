"""The metrics in Prometheus' text format, with vLLM's names under the prefix `minisrv:`.

Sources: requests as they end, HTTP responses, and the scheduler's last StatsMsg.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from minisrv.frontend.generation.timings import Choice, RequestTimings
from minisrv.wire import messages
from minisrv.wire.histogram import SECONDS, TOKENS
from minisrv.wire.messages import StatsMsg

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "minisrv:"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Metrics without a vllm: alias.
_OWN = ("http_", "unknown_request_fields", "harmless_request_fields")


class ServerMetrics:
    """stats: returns the scheduler's last statistics.

    num_unknown: returns the count of request fields that no table names.
    """

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], StatsMsg | None],
        num_unknown: Callable[[], int],
        *,
        vllm_names: bool,
    ) -> None:
        self._vllm_names = vllm_names
        self._model = model_name
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(model_name, stats, num_unknown))
        self._first_token = self._seconds("time_to_first_token", "From arrival to first output.")
        self._whole = self._seconds("e2e_request_latency", "From arrival to the end.")
        self._queue = self._seconds("request_queue_time", "From the scheduler's queue to a step.")
        self._prefill = self._seconds(
            "request_prefill_time", "From the first step to the first token."
        )
        self._decode = self._seconds("request_decode_time", "From the first token to the last.")
        self._inference = self._seconds("request_inference_time", "Prefill and decode.")
        self._per_token = self._seconds(
            "request_time_per_output_token", "Mean time between the tokens of a choice."
        )
        self._prompt_tokens = self._tokens("request_prompt_tokens", "Prompt tokens of a choice.")
        self._output_tokens = self._tokens(
            "request_generation_tokens", "Output tokens of a choice."
        )
        self._ended = Counter(
            f"{PREFIX}request_success",
            "Finished choices, by stop, length, abort or error.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._ignored = Counter(
            f"{PREFIX}harmless_request_fields",
            "Request fields that were accepted and have no effect.",
            ["field"],
            registry=self._registry,
        )
        labels = ["handler", "method", "status"]
        self._responses = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests; status 499 is a client that disconnected.",
            labels,
            registry=self._registry,
        )
        self._response_seconds = Histogram(
            f"{PREFIX}http_request_duration_seconds",
            "From the request's headers to the end of its response.",
            labels[:2],
            buckets=SECONDS,
            registry=self._registry,
        )

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            PREFIX + name, help, ["model_name"], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model)

    def _seconds(self, name: str, help: str) -> Histogram:
        return self._histogram(name + "_seconds", help, SECONDS)

    def _tokens(self, name: str, help: str) -> Histogram:
        return self._histogram(name, help, TOKENS)

    def count_request(self, timings: RequestTimings) -> None:
        """Count a generation that has ended, however it ended."""
        first = timings.first
        finished = [choice for choice in timings.choices.values() if choice.finish_reason]
        for choice in finished:
            self._count_choice(choice)
        failed = timings.num_choices - len(finished)
        if failed:
            self._ended.labels(self._model, timings.failure_reason or "error").inc(failed)
        if first is None:
            return
        self._first_token.observe(first.started_at - timings.arrived_at)
        self._queue.observe(first.start.queue_s)
        if not failed:
            self._prefill.observe(first.start.prefill_s)
            self._decode.observe(timings.decode_s)
            self._inference.observe(first.start.prefill_s + timings.decode_s)
            self._whole.observe(timings.total_s)

    def _count_choice(self, choice: Choice) -> None:
        self._ended.labels(self._model, choice.finish_reason).inc()
        self._prompt_tokens.observe(choice.start.prompt_tokens)
        self._output_tokens.observe(choice.output_tokens)
        if choice.output_tokens > 1 and choice.decode_s is not None:
            self._per_token.observe(choice.decode_s / (choice.output_tokens - 1))

    def count_response(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a response; `route` is the pattern of its path, not the path itself."""
        method = method if method in _METHODS else "other"
        self._responses.labels(route, method, status).inc()
        self._response_seconds.labels(route, method).observe(seconds)

    def count_ignored_field(self, name: str) -> None:
        """Count a field that was accepted and has no effect."""
        self._ignored.labels(name).inc()

    def text(self) -> bytes:
        """The current values of all metrics."""
        text = generate_latest(self._registry)
        return text + _vllm_aliases(text) if self._vllm_names else text


class _SchedulerCollector(Collector):
    """The statistics that the scheduler sends periodically; only the unknown fields before."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], StatsMsg | None],
        num_unknown: Callable[[], int],
    ) -> None:
        self._model = model_name
        self._stats = stats
        self._num_unknown = num_unknown

    def collect(self) -> Iterator[Metric]:
        """All metric families."""
        yield CounterMetricFamily(
            f"{PREFIX}unknown_request_fields",
            "Unknown request fields, which were ignored.",
            value=self._num_unknown(),
        )
        stats = self._stats()
        if stats is None:
            return
        usage = stats.pages_used / stats.num_pages
        yield self._gauge("num_requests_running", "Requests that hold pages.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for pages.", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of pages that requests hold, 0-1.", usage)
        queries, hits = stats.prompt_tokens, stats.cached_tokens
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache.", hits)
        yield self._counter("prompt_tokens", "Prompt tokens, cached ones included.", queries)
        yield self._counter("generation_tokens", "Tokens generated.", stats.output_tokens)
        yield self._counter(
            "num_preemptions", "Preemptions because the cache was full.", stats.preemptions
        )
        yield self._histogram(
            "inter_token_latency_seconds", "Time between two tokens.", stats.inter_token, SECONDS
        )
        yield self._histogram(
            "iteration_tokens_total", "Tokens computed per step.", stats.step_tokens, TOKENS
        )
        info = GaugeMetricFamily(
            f"{PREFIX}cache_config_info",
            "Tokens per page, and number of pages.",
            labels=["model_name", "block_size", "num_gpu_blocks"],
        )
        info.add_metric([self._model, str(stats.page_size), str(stats.num_pages)], 1)
        yield info

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _histogram(
        self, name: str, help: str, histogram: messages.Histogram, bounds: Sequence[float]
    ) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, help, labels=["model_name"])
        sums = histogram.counts.cumsum().tolist()
        buckets = list(zip([*map(str, map(float, bounds)), "+Inf"], map(float, sums), strict=True))
        family.add_metric([self._model], buckets, histogram.total)
        return family


def _vllm_aliases(text: bytes) -> bytes:
    """The lines of metrics that vLLM has, under its prefix."""
    own = "|".join(_OWN)
    lines = re.findall(rf"^(?:# (?:HELP|TYPE) )?{PREFIX}(?!{own}).*\n", text.decode(), re.M)
    return "".join(line.replace(PREFIX, "vllm:", 1) for line in lines).encode()
