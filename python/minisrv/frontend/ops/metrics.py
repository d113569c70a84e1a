"""The metrics in Prometheus' text format, with vLLM's names under the prefix `minisrv:`.

Sources: requests as they end, HTTP responses, the registry, and the scheduler's last StatsMsg.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from minisrv.frontend.generation.groups import in_groups
from minisrv.frontend.generation.timings import ChoiceTimings, RequestTimings
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.histogram import SECONDS, TOKENS
from minisrv.wire.messages import StatsMsg

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "minisrv:"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Metrics that vLLM does not have.
_OWN = (
    *("http_", "unknown_request_fields", "harmless_request_fields"),
    *("refused_requests", "dropped_streams"),
    *("restarts", "resumed_requests", "given_up_requests"),
)

_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]
# The scheduler's figures: kind, name, help and value.
_FIGURES: tuple[tuple[_Family, str, str, Callable[[StatsMsg], float]], ...] = (
    (_GAUGE, "num_requests_running", "Requests that hold pages.", lambda s: s.running),
    (_GAUGE, "num_requests_waiting", "Requests that wait for pages.", lambda s: s.waiting),
    (_GAUGE, "kv_cache_usage_perc", "Pages held, 0 to 1.", lambda s: s.pages_used / s.num_pages),
    (_COUNTER, "prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prompt_tokens),
    (_COUNTER, "prefix_cache_hits", "Prompt tokens found.", lambda s: s.cached_tokens),
    (_COUNTER, "prompt_tokens", "Prompt tokens, cached or not.", lambda s: s.prompt_tokens),
    (_COUNTER, "generation_tokens", "Output tokens.", lambda s: s.output_tokens),
    (_COUNTER, "num_preemptions", "Preemptions for lack of pages.", lambda s: s.preemptions),
)
# Histograms over requests and choices: name, help and bounds of the buckets.
_OBSERVED = (
    ("time_to_first_token_seconds", "From arrival to the first output.", SECONDS),
    ("e2e_request_latency_seconds", "From arrival to the end.", SECONDS),
    ("request_queue_time_seconds", "From the scheduler's queue to the first step.", SECONDS),
    ("request_prefill_time_seconds", "From the first step to the first token.", SECONDS),
    ("request_decode_time_seconds", "From the first token to the last.", SECONDS),
    ("request_inference_time_seconds", "Prefill and decode.", SECONDS),
    ("request_time_per_output_token_seconds", "Mean time between tokens of a choice.", SECONDS),
    ("request_prompt_tokens", "Prompt tokens of a choice.", TOKENS),
    ("request_generation_tokens", "Output tokens of a choice.", TOKENS),
    ("request_max_num_generation_tokens", "Output tokens of a request's longest choice.", TOKENS),
)
# Counters: name, help and labels.
_COUNTED = (
    ("request_success", "Choices by their end.", ["model_name", "finished_reason"]),
    ("harmless_request_fields", "Request fields accepted without effect.", ["field"]),
    ("http_requests", "Requests; 499: client disconnected.", ["handler", "method", "status"]),
)


class ServerMetrics(Collector):
    """num_unknown: returns the count of request fields that no table has."""

    def __init__(
        self,
        model_name: str,
        num_unknown: Callable[[], int],
        requests: RequestRegistry,
        *,
        vllm_names: bool,
    ) -> None:
        self._model = model_name
        self._num_unknown = num_unknown
        self._requests = requests
        self._vllm_names = vllm_names
        self._registry = registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=registry)
        self._counters = {
            name: Counter(PREFIX + name, help, labels, registry=registry)
            for name, help, labels in _COUNTED
        }
        self._histograms = {
            name: Histogram(
                PREFIX + name, help, ["model_name"], buckets=bounds, registry=registry
            ).labels(model_name)
            for name, help, bounds in _OBSERVED
        }
        self._response_seconds = Histogram(
            f"{PREFIX}http_request_duration_seconds",
            "From the request's headers to the end of its response.",
            ["handler", "method"],
            buckets=SECONDS,
            registry=registry,
        )

    async def count_request(self, timings: RequestTimings) -> None:
        """Count a generation that has ended, however it ended."""
        finished = [choice for choice in timings.choices.values() if choice.finish_reason]
        for reason, count in collections.Counter(c.finish_reason for c in finished).items():
            self._count_end(reason, count)
        async for group in in_groups(finished):
            for choice in group:
                self._observe_choice(choice)
        if finished:
            longest = max(choice.output_tokens for choice in finished)
            self._observe("request_max_num_generation_tokens", longest)
        failed = timings.num_choices - len(finished)
        if failed:
            self._count_end(timings.failure_reason or "error", failed)
        first = timings.first
        if first is None:
            return
        self._observe("time_to_first_token_seconds", first.started_at - timings.arrived_at)
        self._observe("request_queue_time_seconds", first.start.queue_s)
        if not failed:
            prefill_s, decode_s = first.start.prefill_s, timings.decode_s
            self._observe("request_prefill_time_seconds", prefill_s)
            self._observe("request_decode_time_seconds", decode_s)
            self._observe("request_inference_time_seconds", prefill_s + decode_s)
            self._observe("e2e_request_latency_seconds", timings.total_s)

    def _observe_choice(self, choice: ChoiceTimings) -> None:
        self._observe("request_prompt_tokens", choice.start.prompt_tokens)
        self._observe("request_generation_tokens", choice.output_tokens)
        if choice.output_tokens > 1 and choice.decode_s is not None:
            seconds = choice.decode_s / (choice.output_tokens - 1)
            self._observe("request_time_per_output_token_seconds", seconds)

    def count_response(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a response; `route` is the pattern of its path, not the path itself."""
        method = method if method in _METHODS else "other"
        self._counters["http_requests"].labels(route, method, status).inc()
        self._response_seconds.labels(route, method).observe(seconds)

    def count_ignored_field(self, name: str) -> None:
        """Count a field that was accepted and has no effect."""
        self._counters["harmless_request_fields"].labels(name).inc()

    def text(self) -> bytes:
        """The current values of all metrics."""
        text = generate_latest(self._registry)
        if not self._vllm_names:
            return text
        own = "|".join(_OWN)
        pattern = rf"^(?:# (?:HELP|TYPE) )?{PREFIX}(?!{own}).*\n"
        lines = re.findall(pattern, text.decode(), re.MULTILINE)
        return text + "".join(line.replace(PREFIX, "vllm:", 1) for line in lines).encode()

    def collect(self) -> Iterator[Metric]:
        """The metrics that are read when they are asked for; the scheduler's after its first."""
        yield CounterMetricFamily(
            f"{PREFIX}unknown_request_fields",
            "Unknown request fields, which were ignored.",
            value=self._num_unknown(),
        )
        for name, help, label, counts in (
            ("refused_requests", "Requests and queries refused.", "reason", self._requests.refused),
            ("restarts", "Processes started again.", "process", self._requests.restarts),
            ("given_up_requests", "Choices ended by a restart.", "reason", self._requests.given_up),
        ):
            family = CounterMetricFamily(PREFIX + name, help, labels=[label])
            for value, count in counts.items():
                family.add_metric([value], count)
            yield family
        for name, help, total in (
            ("dropped_streams", "Streams whose output was not read.", self._requests.num_dropped),
            ("resumed_requests", "Requests sent again.", self._requests.num_resumed),
        ):
            yield CounterMetricFamily(PREFIX + name, help, value=total)
        stats = self._requests.stats
        if stats is None:
            return
        for kind, name, help, figure in _FIGURES:
            gauge = kind(PREFIX + name, help, labels=["model_name"])
            gauge.add_metric([self._model], figure(stats))
            yield gauge
        for name, help, histogram, bounds in (
            ("inter_token_latency_seconds", "Between two tokens.", stats.inter_token, SECONDS),
            ("iteration_tokens_total", "Tokens computed per step.", stats.step_tokens, TOKENS),
        ):
            buckets = HistogramMetricFamily(PREFIX + name, help, labels=["model_name"])
            upper = [*(str(float(bound)) for bound in bounds), "+Inf"]
            totals = map(float, histogram.counts.cumsum().tolist())
            buckets.add_metric(
                [self._model], list(zip(upper, totals, strict=True)), histogram.total
            )
            yield buckets
        labels = {"block_size": str(stats.page_size), "num_gpu_blocks": str(stats.num_pages)}
        info = GaugeMetricFamily(
            f"{PREFIX}cache_config_info", "Tokens per page; pages.", labels=["model_name", *labels]
        )
        info.add_metric([self._model, *labels.values()], 1)
        yield info

    def _count_end(self, reason: str | None, count: int = 1) -> None:
        self._counters["request_success"].labels(self._model, reason).inc(count)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)
