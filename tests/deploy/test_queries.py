"""Prometheus rules and the Grafana board query only metrics, recorded rules and labels that exist."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from proxy.telemetry.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana/dashboards/autotts.json").read_text())
RULES = [
    rule for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"] for rule in group["rules"]
]
SCRAPED = {"instance", "job", "namespace"}
"""Labels Prometheus adds."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def known_series() -> dict[str, set[str]]:
    """Return the labels of each exported or recorded series by its name."""
    series: dict[str, set[str]] = {"up": set()}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[str(metric._type)]:
                labels = {*metric._labelnames, *({"le"} if suffix == "_bucket" else ())}
                series[f"{metric._name}{suffix}"] = labels
    for rule in RULES:
        if "record" in rule:
            series[rule["record"]] = {label for group in grouping_labels(rule["expr"]) for label in group}
    return series


def grouping_labels(query: str) -> list[set[str]]:
    """Return the labels of each `by` or `on` clause of a query."""
    groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
    return [{name for name in re.split(r"[,\s]+", group) if name} for group in groups]


def unknown_names(query: str, series: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield the metrics and labels of a query that do not exist."""
    names = re.findall(r"\b(autotts[_:][\w:]+|up(?=\{))(?:\{([^}]*)\})?", query)
    if not names:
        yield "no metric"
    known: set[str] = set(SCRAPED)
    for name, matchers in names:
        if name not in series:
            yield f"metric {name}"
            continue
        known |= series[name]
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', matchers)):
            if label not in series[name] | SCRAPED:
                yield f"label {label} of {name}"
    yield from (f"label {label}" for group in grouping_labels(query) for label in group - known)


def queries() -> dict[str, str]:
    queries_by_name = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in RULES}
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            queries_by_name[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    return queries_by_name


@pytest.mark.parametrize("query", [pytest.param(query, id=name) for name, query in queries().items()])
def test_every_metric_and_label_of_a_query_exists(query: str) -> None:
    assert list(unknown_names(query, known_series())) == []


@pytest.mark.parametrize(
    "query",
    [
        "autotts_token_total",
        'autotts_tokens_total{kid="winner"}',
        "sum by (reason) (autotts_tokens_total)",
        "autotts:tokens:rate9m",
        "sum(x)",
    ],
)
def test_a_query_with_an_unknown_metric_or_label_is_detected(query: str) -> None:
    assert list(unknown_names(query, known_series()))


def test_labels_in_annotations_and_legends_are_kept_by_their_queries() -> None:
    series = known_series()
    for rule in RULES:
        for label in re.findall(r"\$labels\.(\w+)", rule.get("annotations", {}).get("summary", "")):
            names = re.findall(r"\bautotts[_:][\w:]+|\bup\b", rule["expr"])
            assert label in SCRAPED | series[names[0]], rule
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                kept = grouping_labels(target["expr"])
                assert any(label in group for group in kept) or (not kept and has_label(label, target, series)), target


def has_label(label: str, target: Mapping[str, Any], series: Mapping[str, set[str]]) -> bool:
    """Return whether every series of a query without aggregation has the label."""
    names = re.findall(r"\bautotts[_:][\w:]+", target["expr"])
    return all(label in series[name] | SCRAPED for name in names)


def test_the_board_has_its_six_rows_and_unique_panel_ids() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Spend", "Answers", "Latency", "Upstream", "Recorder", "Controllers"]
    idents = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(idents)) == len(idents)


def test_every_exported_metric_is_used_by_a_rule_or_panel() -> None:
    queried = set(re.findall(r"\bautotts_\w+", " ".join(queries().values())))
    exported = {name for name in known_series() if name.startswith("autotts_")}
    suffix = re.compile("_(bucket|sum|count)$")
    assert {suffix.sub("", name) for name in exported} - {suffix.sub("", name) for name in queried} == set()


def test_no_panels_of_the_board_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell[0] < 24
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_the_board_asks_for_a_data_source_and_the_provisioned_one_is_the_default() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (source,) = sources
    assert (source["type"], source["isDefault"]) == ("prometheus", True)  # Grafana chooses the default at first
    first, *others = BOARD["templating"]["list"]
    assert (first["type"], first["query"], first["name"]) == ("datasource", "prometheus", "datasource")
    users = [part for part in [*BOARD["panels"], *others] if "datasource" in part]
    assert {user["datasource"]["uid"] for user in users} == {"${datasource}"}
    providers = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/autotts.yml").read_text())["providers"]
    assert [provider["type"] for provider in providers] == ["file"]
