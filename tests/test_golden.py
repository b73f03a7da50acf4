"""Golden files at both ends: objects in, Envoy's resources out, and the real Envoy accepts every one of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import Secret

import bootstrap
from bench.envoy import find_envoy
from tests.goldens import CASES, OUTPUTS, ROOT, build, decoded, golden_files, outputs
from xds.snapshot import SECRET


@pytest.mark.parametrize("name", CASES)
def test_output_is_what_the_golden_files_say(name: str) -> None:
    """A change of what Envoy is told is seen, whole, in a diff (`make golden` writes the files)."""
    files = ("rejections.txt", *OUTPUTS, "pools.yaml")
    expected = {file: (golden_files(name) / file).read_text() for file in files}
    assert outputs(CASES[name]) == expected


@pytest.mark.parametrize("name", CASES)
def test_equal_input_gives_equal_bytes(name: str) -> None:
    """Versions are hashes of bytes, so a second server must build the very same ones."""
    assert build(CASES[name]) == build(CASES[name])


def test_bootstrap_in_the_tree_is_what_the_command_prints() -> None:
    """bootstrap/envoy.yaml never drifts from `vllm-xds bootstrap`."""
    assert (ROOT / "bootstrap" / "envoy.yaml").read_text() == bootstrap.render()


def _static(name: str) -> dict[str, Any]:
    """The case as a static configuration: routes inside their listener, endpoints inside their cluster, and secrets."""
    snapshot, _ = build(CASES[name])
    listeners, routes, clusters, endpoints = (decoded(snapshot, *OUTPUTS[file]) for file in OUTPUTS)
    by_name = {route["name"]: route for route in routes}
    for chain in (chain for listener in listeners for chain in listener["filter_chains"]):
        for filter_ in chain["filters"]:
            rds = filter_["typed_config"].pop("rds")
            filter_["typed_config"]["route_config"] = by_name[rds["route_config_name"]] | {"validate_clusters": False}
        if "transport_socket" in chain:
            context = chain["transport_socket"]["typed_config"]["common_tls_context"]
            for secret in context["tls_certificate_sds_secret_configs"]:
                del secret["sds_config"]  # then it is a static one
    secrets = decoded(snapshot, SECRET, Secret)
    assignments = {assignment["cluster_name"]: assignment for assignment in endpoints}
    for cluster in clusters:
        if cluster.pop("eds_cluster_config", None):
            cluster |= {"type": "STATIC", "load_assignment": assignments[cluster["name"]]}
    return {"static_resources": {"listeners": listeners, "clusters": clusters, "secrets": secrets}}


@pytest.mark.envoy
@pytest.mark.parametrize("name", CASES)
def test_real_envoy_accepts_it(name: str, tmp_path: Path) -> None:
    """`envoy --mode validate` takes every resource of every case: the proto rules we can not check ourselves."""
    config = tmp_path / "envoy.json"
    config.write_text(json.dumps(_static(name)))
    command = [find_envoy(), "-c", str(config), "--mode", "validate", "--use-dynamic-base-id"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"configuration '{config}' OK" in done.stdout


@pytest.mark.envoy
@pytest.mark.parametrize("delta", [True, False])
def test_real_envoy_accepts_the_bootstrap(tmp_path: Path, *, delta: bool) -> None:
    """Both variants, a host name, IPv6 addresses and a status page are bootstraps Envoy takes."""
    config = tmp_path / "envoy.yaml"
    status = "[::1]:19003" if delta else None
    text = bootstrap.render("xds.example.com:18000", 'quote"d', "c", "[::1]:19000", delta=delta, status=status)
    config.write_text(text)
    command = [find_envoy(), "-c", str(config), "--mode", "validate", "--use-dynamic-base-id"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
