"""The PromQL of manifests/alerts and manifests/dashboards: which metrics and labels it uses."""

from __future__ import annotations

import json
import re

import yaml

from tests.goldens import ROOT

DASHBOARD = ROOT / "manifests" / "dashboards" / "vllm-xds.json"
RULES = ROOT / "manifests" / "alerts" / "rules.yaml"

_METRIC = re.compile(r"\b(?:vllm_xds_|vllm:|envoy_)\w+")
_NOT_METRICS = re.compile(r"\{[^}]*\}|\b(?:by|on)\s*\([^)]*\)")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
_BY = re.compile(r"\bby\s*\(([^)]*)\)")


def expressions() -> list[str]:
    """Every expression of the alerts and of the dashboard's panels."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["spec"]["groups"] for rule in group["rules"]]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [rule["expr"] for rule in rules] + [each["expr"] for panel in panels for each in panel.get("targets", ())]


def metrics(expression: str) -> set[str]:
    return set(_METRIC.findall(_NOT_METRICS.sub("", expression)))


def labels(expression: str) -> set[str]:
    """Those that it matches on or sums by."""
    by = {name.strip() for names in _BY.findall(expression) for name in names.split(",")}
    return by | set(_MATCHER.findall(expression))
