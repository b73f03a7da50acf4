"""manifests/kubernetes as `kubectl kustomize` renders it, and what its objects say to each other."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.goldens import ROOT

KUBERNETES = ROOT / "manifests" / "kubernetes"
KUBECTL = Path(sysconfig.get_path("scripts")) / "kubectl"

Object = dict[str, Any]


@functools.cache
def rendered(directory: Path) -> str:
    """The YAML that `kubectl apply -k directory` would send."""
    assert KUBECTL.exists(), f"no {KUBECTL}: `make kubectl` fetches it"
    done = subprocess.run(
        [KUBECTL, "kustomize", str(directory)], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(directory: Path) -> list[Object]:
    """The same as documents, which are the caller's own."""
    return list(yaml.safe_load_all(rendered(directory)))


def combined(directory: Path, *components: str) -> Path:
    """A new overlay in `directory`, beside a copy of the manifests: server and envoy with these components."""
    shutil.copytree(ROOT / "manifests", directory / "manifests", dirs_exist_ok=True)
    overlay = directory / "overlay"
    overlay.mkdir()
    kubernetes = "../manifests/kubernetes"
    kustomization = {
        "resources": [f"{kubernetes}/server", f"{kubernetes}/envoy"],
        "components": [f"{kubernetes}/components/{name}" for name in components],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return overlay


# --- looking at them ---


def one(found: list[Object], kind: str, name: str) -> Object:
    (match,) = [each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return match


def pod_spec(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def containers(workload: Object) -> list[Object]:
    """Of a Deployment, in the order in which they start."""
    spec = pod_spec(workload)
    return [*spec.get("initContainers", ()), *spec["containers"]]


def container(found: list[Object], name: str) -> Object:
    (match,) = [c for each in found if each["kind"] == "Deployment" for c in containers(each) if c["name"] == name]
    return match


def options(arguments: list[str]) -> dict[str, str]:
    """`--name=value` -> name and value; "" for a flag."""
    return {name: value for name, _, value in (each.partition("=") for each in arguments if each.startswith("--"))}


# --- whether they agree ---


def faults(found: list[Object]) -> list[str]:
    """Every name, label, port and volume that one object uses and no other has; a sentence each."""
    return [*_selector_faults(found), *_pod_faults(found), *_rbac_faults(found)]


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def _selector_faults(found: list[Object]) -> Iterator[str]:
    workloads = [each for each in found if each["kind"] == "Deployment"]
    for each in found:
        where = f"{each['kind']} {each['metadata']['name']}"
        match each["kind"]:
            case "Service":
                selector = each["spec"]["selector"]
            case "PodDisruptionBudget" | "Deployment":
                selector = each["spec"]["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = each["spec"]["podSelector"]["matchLabels"]
            case _:
                continue
        chosen = [
            workload
            for workload in workloads
            if workload["metadata"].get("namespace") == each["metadata"].get("namespace")
            and _selects(selector, workload["spec"]["template"]["metadata"]["labels"])
        ]
        if len(chosen) != 1:
            yield f"{where} selects {len(chosen)} Deployments"
            continue
        ports = {p[key] for c in containers(chosen[0]) for p in c.get("ports", ()) for key in ("name", "containerPort")}
        wanted = [port["targetPort"] for port in each["spec"].get("ports", ())] if each["kind"] == "Service" else []
        if each["kind"] == "NetworkPolicy":
            wanted = [port["port"] for rule in each["spec"]["ingress"] for port in rule["ports"]]
        yield from (f"{where}: no container has the port {port}" for port in wanted if port not in ports)


def _pod_faults(found: list[Object]) -> Iterator[str]:
    accounts = {(a["metadata"].get("namespace"), a["metadata"]["name"]) for a in found if a["kind"] == "ServiceAccount"}
    for workload in found:
        if workload["kind"] != "Deployment":
            continue
        spec, name = pod_spec(workload), workload["metadata"]["name"]
        account = spec.get("serviceAccountName")
        if account and (workload["metadata"].get("namespace"), account) not in accounts:
            yield f"Deployment {name}: no ServiceAccount {account}"
        volumes, mounted = {volume["name"] for volume in spec.get("volumes", ())}, set()
        for each in containers(workload):
            mounted |= {mount["name"] for mount in each.get("volumeMounts", ())}
            variables = set(re.findall(r"\$\((\w+)\)", " ".join(each.get("args", ()))))
            unset = variables - {variable["name"] for variable in each.get("env", ())}
            yield from (f"container {each['name']}: no variable {variable}" for variable in sorted(unset))
            ports = {port["name"] for port in each.get("ports", ())}
            probes = {each[probe]["httpGet"]["port"] for probe in each if probe.endswith("Probe")}
            yield from (f"container {each['name']}: a probe at its port {port}" for port in sorted(probes - ports))
        yield from (f"Deployment {name}: volume {volume}" for volume in sorted(volumes ^ mounted))


def _rbac_faults(found: list[Object]) -> Iterator[str]:
    known = {(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in found}
    for each in found:
        if not each["kind"].endswith("RoleBinding") and each["kind"] != "ClusterRoleBinding":
            continue
        where = f"{each['kind']} {each['metadata']['name']}"
        role = each["roleRef"]
        namespace = None if role["kind"] == "ClusterRole" else each["metadata"]["namespace"]
        if (role["kind"], namespace, role["name"]) not in known:
            yield f"{where}: no {role['kind']} {role['name']}"
        for subject in each["subjects"]:
            if (subject["kind"], subject["namespace"], subject["name"]) not in known:
                yield f"{where}: no {subject['kind']} {subject['namespace']}/{subject['name']}"


# --- RBAC ---

Grant = tuple[str, str, str]  # group, resource, verb


def grants(found: list[Object]) -> dict[str, set[Grant]]:
    """What the bound roles grant: in each namespace, and under "" in all of them."""
    roles = {
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]): each["rules"]
        for each in found
        if each["kind"] in ("Role", "ClusterRole")
    }
    granted: dict[str, set[Grant]] = {}
    for each in found:
        if each["kind"] not in ("RoleBinding", "ClusterRoleBinding"):
            continue
        namespace = each["metadata"].get("namespace")
        role = each["roleRef"]
        rules = roles[role["kind"], namespace if role["kind"] == "Role" else None, role["name"]]
        granted.setdefault(namespace or "", set()).update(
            (group, resource, verb)
            for rule in rules
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        )
    return granted
