"""Alerts and the dashboard name metrics that exist. tests/envoy/test_manifests.py looks for Envoy's on its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml
from prometheus_client import CollectorRegistry

from bench.vllm_families import FAMILIES
from picker.metrics import PickerMetrics
from tests.monitoring import DASHBOARD, RULES, expressions, labels, metrics
from xds.metrics import EndpointCollector, EndpointState, Metrics, ResourceCollector, ResourceState
from xds.model import Load

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
ADDED = {"pod", "namespace", "le"}  # by Prometheus


def ours() -> dict[str, set[str]]:
    """Each series of both processes, and its labels."""
    server, picker = Metrics().registry, PickerMetrics().registry
    server.register(EndpointCollector(lambda: [EndpointState("p", "e", 1, 0.0, Load(), 0)]))
    server.register(ResourceCollector(lambda: [ResourceState("pods", 1, 0.0)]))
    return dict(_series(server)) | dict(_series(picker))


def _series(registry: CollectorRegistry) -> Iterator[tuple[str, set[str]]]:
    declared = {name: set(getattr(c, "_labelnames", ())) for c, names in registry._collector_to_names.items()
                for name in names}  # fmt: skip
    for family in registry.collect():
        sampled = {label for sample in family.samples for label in sample.labels}
        for suffix in SUFFIXES[family.type]:
            yield f"{family.name}{suffix}", declared.get(family.name, set()) | sampled


def vllm() -> set[str]:
    """Each series of a vLLM pod's page."""
    return {
        f"{family.name}{suffix}"
        for family in FAMILIES
        for suffix in (SUFFIXES["histogram"] if family.kind == "histogram" else ("",))
    }


def test_every_metric_exists() -> None:
    """A series that is renamed or dropped would leave its panel empty and its alert silent."""
    known = ours().keys() | vllm()
    used = {name for expression in expressions() for name in metrics(expression)}
    assert {name for name in used if not name.startswith("envoy_")} <= known
    assert {name.partition("_")[0].partition(":")[0] for name in used} == {"vllm", "envoy"}
    assert len(used) > 20
    assert metrics('sum by (vllm_xds_x) (vllm_xds_no{envoy_y="1"})') == {"vllm_xds_no"}
    assert "vllm_xds_no" not in known


@pytest.mark.parametrize("expression", [each for each in expressions() if "vllm_xds_" in each])
def test_every_label_exists(expression: str) -> None:
    """What is summed by, or matched on, is a label of the series, or one that Prometheus adds."""
    series = ours()
    known = ADDED.union(*(series[name] for name in metrics(expression) if name in series))
    assert labels(expression) <= known
    assert "pods" not in known


def test_alerts_say_what_they_mean() -> None:
    """Each has a severity and a sentence, waits a while, and only uses labels that its expression leaves."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["spec"]["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+m", rule["for"])
        summary = rule["annotations"]["summary"]
        assert summary.endswith(".")
        assert set(re.findall(r"\$labels\.(\w+)", summary)) <= labels(rule["expr"]), rule["alert"]


def test_panels_have_their_place() -> None:
    """Ids are unique, panels lie side by side and never on each other, and every one asks the chosen Prometheus."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) == 23
    charts = [panel for panel in panels if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in charts} == {"${datasource}"}
    assert all(panel["targets"] for panel in charts)
