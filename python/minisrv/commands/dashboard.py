"""`minisrv dashboard`: a dashboard for Grafana, whose queries read the metrics of /metrics."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_SCHEMA_VERSION = 39  # of Grafana 11; later ones read it too
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_INSTANCE = 'instance=~"$instance"'
_QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph over time. queries: legends to expressions. unit: one of Grafana's names."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the dashboard as JSON."""
    parser = argparse.ArgumentParser(
        prog="minisrv dashboard",
        description="Print a Grafana dashboard for minisrv's metrics in Prometheus.",
        epilog="minisrv dashboard > minisrv.json; then in Grafana: Dashboards, New, Import.",
    )
    parser.parse_args(argv)
    print(json.dumps(make_dashboard(), indent=2))
    return 0


def _gauge(name: str) -> str:
    return f"sum(minisrv:{name}{{{_INSTANCE}}})"


def _rate(name: str, *labels: str) -> str:
    by = f" by ({', '.join(labels)}) " if labels else ""
    return f"sum{by}(rate(minisrv:{name}{{{_INSTANCE}}}[$__rate_interval]))"


def _count(name: str, label: str) -> str:
    """Events since the start: a series that begins with its first event shows no increase by it."""
    return f"sum by ({label}) (minisrv:{name}{{{_INSTANCE}}})"


def _increase(name: str) -> str:
    return f"sum(increase(minisrv:{name}{{{_INSTANCE}}}[$__rate_interval]))"


def _quantiles(name: str) -> dict[str, str]:
    buckets = _rate(f"{name}_bucket", "le")
    return {f"p{q * 100:g}": f"histogram_quantile({q:g}, {buckets})" for q in _QUANTILES}


def _mean(name: str) -> dict[str, str]:
    return {"mean": f"{_rate(f'{name}_sum')} / {_rate(f'{name}_count')}"}


# By the title of their row.
_PANELS: dict[str, list[Panel]] = {
    "Load": [
        Panel(
            "Requests",
            "Running requests hold pages of the KV cache; the others wait for pages.",
            "none",
            {
                "running": _gauge("num_requests_running"),
                "waiting": _gauge("num_requests_waiting"),
            },
        ),
        Panel(
            "Tokens per second",
            "Of prompts, cached ones included, and of outputs.",
            "none",
            {
                "prompt": _rate("prompt_tokens_total"),
                "of these cached": _rate("prefix_cache_hits_total"),
                "output": _rate("generation_tokens_total"),
            },
        ),
        Panel(
            "Choices per second, by their end",
            "stop: an end token or a stop string. length: max_tokens or the context.",
            "none",
            {"{{finished_reason}}": _rate("request_success_total", "finished_reason")},
        ),
    ],
    "Cache": [
        Panel(
            "Pages in use",
            "Share of the KV cache that running requests hold; cached pages are not counted.",
            "percentunit",
            {"{{instance}}": f"minisrv:kv_cache_usage_perc{{{_INSTANCE}}}"},
        ),
        Panel(
            "Hit rate of the prefix cache",
            "Share of the prompt tokens that were found in the cache.",
            "percentunit",
            {
                "hit rate": f"{_rate('prefix_cache_hits_total')} / "
                f"{_rate('prefix_cache_queries_total')}"
            },
        ),
        Panel(
            "Preemptions",
            "Requests that lost their pages to others and are computed again. Many of them: "
            "the KV cache is too small for --max-running-requests.",
            "none",
            {"preemptions": _increase("num_preemptions_total")},
        ),
    ],
    "Latency": [
        Panel(
            "Time to first token",
            "From the arrival of a request to its first output.",
            "s",
            _quantiles("time_to_first_token_seconds"),
        ),
        Panel(
            "Time between tokens",
            "Measured in the scheduler.",
            "s",
            _quantiles("inter_token_latency_seconds"),
        ),
        Panel(
            "Whole request",
            "From the arrival of a request to its end.",
            "s",
            _quantiles("e2e_request_latency_seconds"),
        ),
        Panel(
            "Queue",
            "From the scheduler's queue to the first step.",
            "s",
            _quantiles("request_queue_time_seconds"),
        ),
        Panel(
            "Prefill",
            "From the first step to the first token.",
            "s",
            _quantiles("request_prefill_time_seconds"),
        ),
        Panel(
            "Decode",
            "From the first token to the last.",
            "s",
            _quantiles("request_decode_time_seconds"),
        ),
    ],
    "Sizes": [
        Panel(
            "Prompt tokens of a choice",
            "Cached ones included.",
            "none",
            _quantiles("request_prompt_tokens") | _mean("request_prompt_tokens"),
        ),
        Panel(
            "Output tokens of a choice",
            "Reasoning included.",
            "none",
            _quantiles("request_generation_tokens") | _mean("request_generation_tokens"),
        ),
        Panel(
            "Tokens computed per step",
            "One for each decoding request, and the chunks of prompts.",
            "none",
            _quantiles("iteration_tokens_total") | _mean("iteration_tokens_total"),
        ),
    ],
    "HTTP": [
        Panel(
            "Responses per second, by status",
            "499: the client has left.",
            "none",
            {"{{status}}": _rate("http_requests_total", "status")},
        ),
        Panel(
            "Mean duration, by route",
            "To the end of the response, streams included.",
            "s",
            {
                "{{handler}}": f"{_rate('http_request_duration_seconds_sum', 'handler')} / "
                f"{_rate('http_request_duration_seconds_count', 'handler')}"
            },
        ),
        Panel(
            "Refused with 503 since the start, by limit",
            "docs/api.md lists the limits.",
            "none",
            {"{{reason}}": _count("refused_requests_total", "reason")},
        ),
    ],
    "Trouble": [
        Panel(
            "Processes started again since the start",
            "Processes that died or hung.",
            "none",
            {"{{process}}": _count("restarts_total", "process")},
        ),
        Panel(
            "Requests over a restart",
            "Resumed ones go on with the same text; those given up are counted since the start.",
            "none",
            {
                "resumed": _increase("resumed_requests_total"),
                "given up: {{reason}}": _count("given_up_requests_total", "reason"),
            },
        ),
        Panel(
            "Clients",
            "Streams ended because the client did not read, unknown fields of requests, and, "
            "since the start, those without effect.",
            "none",
            {
                "dropped streams": _increase("dropped_streams_total"),
                "unknown fields": _increase("unknown_request_fields_total"),
                "{{field}}": _count("harmless_request_fields_total", "field"),
            },
        ),
    ],
}


def make_dashboard() -> dict[str, Any]:
    """Grafana's model of the dashboard, as its import takes it."""
    return {
        "title": "minisrv",
        "uid": "minisrv",
        "description": "One or more minisrv servers, from the metrics that Prometheus scrapes.",
        "tags": ["minisrv", "llm"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,  # the same moment in all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    """What is chosen at the top of the dashboard."""
    query = "label_values(minisrv:unknown_request_fields_total, instance)"
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "label": "Server",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": query, "refId": "instances"},
            "refresh": 2,  # when the range of time changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _panels() -> Iterator[dict[str, Any]]:
    """Rows and graphs, three beside each other."""
    number, top = 1, 0
    for title, panels in _PANELS.items():
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
        }
        top += 1
        for i, panel in enumerate(panels):
            left, below = i * _WIDTH % _COLUMNS, i * _WIDTH // _COLUMNS * _HEIGHT
            position = {"x": left, "y": top + below, "w": _WIDTH, "h": _HEIGHT}
            yield {"id": number + 1 + i, "gridPos": position, **_graph(panel)}
        number += 1 + len(panels)
        top += -(-len(panels) * _WIDTH // _COLUMNS) * _HEIGHT


def _graph(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10}}
    if panel.unit == "percentunit":
        defaults["max"] = 1
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _DATASOURCE,
                "expr": query,
                "legendFormat": legend,
            }
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
