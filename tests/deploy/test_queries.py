"""What rules and the board ask for is what the proxy tells: metrics, recorded rules and labels by name."""

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
SCRAPED = {"instance", "job"}
"""Labels Prometheus adds."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def told() -> dict[str, set[str]]:
    """Labels of each series by its name."""
    series: dict[str, set[str]] = {"up": set()}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in SUFFIXES[str(metric._type)]:
                labels = {*metric._labelnames, *({"le"} if suffix == "_bucket" else ())}
                series[f"{metric._name}{suffix}"] = labels
    for rule in RULES:
        if "record" in rule:
            series[rule["record"]] = {label for by in bys(rule["expr"]) for label in by}
    return series


def bys(query: str) -> list[set[str]]:
    """The labels that are kept, or matched on, each time some are."""
    groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query)
    return [{name for name in re.split(r"[,\s]+", group) if name} for group in groups]


def wrong(query: str, series: Mapping[str, set[str]]) -> Iterator[str]:
    """What a query asks for that there is not."""
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
    yield from (f"label {label}" for by in bys(query) for label in by - known)


def queries() -> dict[str, str]:
    found = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in RULES}
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    return found


@pytest.mark.parametrize("query", [pytest.param(query, id=name) for name, query in queries().items()])
def test_what_is_asked_for_is_there(query: str) -> None:
    assert list(wrong(query, told())) == []


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
def test_what_is_not_there_is_noticed(query: str) -> None:
    assert list(wrong(query, told()))


def test_labels_of_annotations_and_legends_are_kept_by_their_queries() -> None:
    series = told()
    for rule in RULES:
        for label in re.findall(r"\$labels\.(\w+)", rule.get("annotations", {}).get("summary", "")):
            names = re.findall(r"\bautotts[_:][\w:]+|\bup\b", rule["expr"])
            assert label in SCRAPED | series[names[0]], rule
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                kept = bys(target["expr"])
                assert any(label in by for by in kept) or (not kept and names_of(label, target, series)), target


def names_of(label: str, target: Mapping[str, Any], series: Mapping[str, set[str]]) -> bool:
    """Whether every series of a query that sums nothing has the label."""
    names = re.findall(r"\bautotts[_:][\w:]+", target["expr"])
    return all(label in series[name] | SCRAPED for name in names)


def test_the_board_is_about_everything_an_operator_asks() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Spend", "Answers", "Latency", "Upstream", "Recorder", "Controllers"]
    idents = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(idents)) == len(idents)


def test_no_metric_is_told_that_nobody_looks_at() -> None:
    asked = set(re.findall(r"\bautotts_\w+", " ".join(queries().values())))
    told_ = {name for name in told() if name.startswith("autotts_")}
    suffix = re.compile("_(bucket|sum|count)$")
    assert {suffix.sub("", name) for name in told_} - {suffix.sub("", name) for name in asked} == set()


def test_no_panel_lies_on_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        for cell in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])):
            assert cell[0] < 24
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_provisioning_names_what_the_board_asks() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    asked = {panel["datasource"]["uid"] for panel in BOARD["panels"] if "datasource" in panel}
    assert asked == {source["uid"] for source in sources}
    providers = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/autotts.yml").read_text())["providers"]
    assert [provider["type"] for provider in providers] == ["file"]
