"""`minisrv dashboard`: every query reads series that a running server exports."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minisrv.commands import cli
from tests.support.http_server import serve
from tests.support.scripted_backend import stats

ADDED = {"instance", "job"}  # labels that Prometheus adds
# Counters whose series begin with their first event, which is no increase to Prometheus.
COUNTED = [
    ("minisrv:refused_requests_total", {"reason"}),
    ("minisrv:restarts_total", {"process"}),
    ("minisrv:given_up_requests_total", {"reason"}),
    ("minisrv:harmless_request_fields_total", {"field"}),
]


@pytest.fixture
def dashboard(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["dashboard"]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


def queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    assert panels
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_query_reads_metrics_of_its_kind_with_its_labels(dashboard: dict[str, Any]) -> None:
    with serve() as server:
        assert server.chat(store=True).status_code == 200
        registry = server.registry
        registry.refused["open_requests"] = registry.given_up["suspect"] = 1
        registry.restarts["scheduler"] = 1
        registry.stats = stats()
        text = server.http.get("/metrics").text
    kinds: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            kinds[sample.name] = family.type
            labels.setdefault(sample.name, set()).update(sample.labels)
    for query in queries(dashboard):
        names = set(re.findall(r"minisrv:\w+", query))
        assert names, query
        assert names <= kinds.keys(), query
        grouped = {
            label for by in re.findall(r"by \(([\w, ]+)\)", query) for label in by.split(", ")
        }
        for name in names:
            assert grouped - ADDED <= labels[name], query
            is_rate = re.search(rf"(rate|increase)\({name}{{", query) is not None
            expected = kinds[name] != "gauge" and (name, grouped) not in COUNTED
            assert is_rate == expected, query
            assert name.endswith("_bucket") == query.startswith("histogram_quantile"), query
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in ADDED or f"by ({label})" in target["expr"], target


def test_panels_do_not_overlap_and_have_their_own_ids(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
