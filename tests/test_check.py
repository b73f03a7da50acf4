"""`vllm-xds check`: what is wrong with a directory, and what would be served of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.goldens import ROOT
from xds.__main__ import main
from xds.check import check
from xds.directory import DirectoryError
from xds.resolve import CONTROLLER_NAMES

WHOLE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: envoy}
spec: {controllerName: vllm-xds.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: envoy
  listeners: [{name: http, protocol: HTTP, port: 8080}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web}
spec:
  parentRefs: [{name: gw}]
  rules:
  - backendRefs: [{name: web, port: 80, weight: 3}, {name: canary, port: 80}]
    matches: [{path: {value: /}}]
  - filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]
    matches: [{path: {value: /old}}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: canary}
spec: {selector: {app: canary}, ports: [{port: 80}]}
"""


def checked(directory: Path) -> tuple[int, list[str]]:
    out = io.StringIO()
    code = check(directory, CONTROLLER_NAMES, out)
    return code, out.getvalue().splitlines()


def test_models_are_shown(tmp_path: Path) -> None:
    """Each pool's rules and objectives, as they count; a conflict among them is an error."""
    (tmp_path / "a.yaml").write_text((ROOT / "tests" / "golden" / "models" / "input.yaml").read_text())
    code, lines = checked(tmp_path)
    assert code == 1
    shown = [" ".join(line.split()) for line in lines if line.startswith(("  model", "  objective"))]
    assert shown == [
        "model batch -> as it is, Sheddable",
        "model chat -> chat-v1 (90), chat-v2 (10), Critical",
        "model any other -> base (1)",
        "model code -> code-lora (1)",
        "model code-latest -> code-lora (1)",
        "objective batch priority -1",
        "model base -> as it is",
    ]


def test_the_demo_is_served_as_written() -> None:
    """Exit code 0, and a line for each port, route and cluster."""
    code, lines = checked(ROOT / "manifests" / "demo")
    assert code == 0
    assert "port 8081" in lines
    assert "cluster pool/default/vllm-qwen-pool: PREFIX_CACHE, 8 endpoints" in lines
    assert lines[-1].endswith(" objects accepted, 0 errors, 0 warnings")


def test_it_says_where_requests_go(tmp_path: Path) -> None:
    """Hostname, route and goal, with the weights where there are several."""
    (tmp_path / "all.yaml").write_text(WHOLE)
    code, lines = checked(tmp_path)
    assert code == 0
    assert [line.split() for line in lines] == [
        ["port", "8080"],
        ["*", "default/web/1/0", "->", "redirect"],
        ["*", "default/web/0/0", "->", "service/default/web/80", "(3),", "service/default/canary/80", "(1)"],
        ["cluster", "service/default/canary/80:", "round", "robin,", "0", "endpoints"],
        ["cluster", "service/default/web/80:", "round", "robin,", "0", "endpoints"],
        ["5", "objects", "accepted,", "0", "errors,", "0", "warnings"],
    ]


def test_a_broken_object_is_named_with_file_line_and_field(tmp_path: Path) -> None:
    """Exit code 1; the line says where, whose, what and why, and the rest is still looked at."""
    (tmp_path / "all.yaml").write_text(WHOLE.replace("port: 80, weight: 3", "port: 80, weight: -3"))
    code, lines = checked(tmp_path)
    assert code == 1
    assert lines[0].startswith("error   all.yaml:13: HTTPRoute default/web: spec.rules[0].backendRefs[0].weight: ")
    assert lines[0].endswith(" (Invalid)")
    assert lines[-1] == "4 objects accepted, 1 errors, 0 warnings"


def test_what_does_not_resolve_is_an_error_too(tmp_path: Path) -> None:
    """An object may be right in itself and name what does not exist."""
    (tmp_path / "all.yaml").write_text(WHOLE.replace("{name: canary, port: 80}", "{name: missing, port: 80}"))
    code, lines = checked(tmp_path)
    assert code == 1
    assert lines[0] == (
        "error   all.yaml:13: HTTPRoute default/web: spec.rules[0].backendRefs[1]: "
        "Service default/missing does not exist (BackendNotFound)"
    )
    assert any(line.endswith("-> service/default/web/80 (3), 500 (1)") for line in lines)


def test_a_warning_is_not_an_error(tmp_path: Path) -> None:
    """It is said, and the exit code stays 0: another controller's Gateway is no mistake."""
    (tmp_path / "all.yaml").write_text(WHOLE.replace("vllm-xds.dev/gateway-controller", "istio.io/gateway"))
    code, lines = checked(tmp_path)
    assert code == 0
    assert lines[0].startswith("warning all.yaml:6: Gateway default/gw: spec.gatewayClassName: ")
    assert lines[-1].endswith(", 0 errors, 1 warnings")


def test_a_missing_directory_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command; `check` itself raises."""
    missing = tmp_path / "missing"
    with pytest.raises(DirectoryError):
        checked(missing)
    assert main(["check", str(missing)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"vllm-xds check: cannot read {missing}: No such file or directory\n"


def test_another_controllers_name_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--controller-name` replaces the default ones."""
    (tmp_path / "all.yaml").write_text(WHOLE.replace("vllm-xds.dev/gateway-controller", "istio.io/gateway"))
    assert main(["check", str(tmp_path), "--controller-name", "istio.io/gateway"]) == 0
    assert "port 8080" in capsys.readouterr().out
