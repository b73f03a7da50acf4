"""Statuses, Events and the Lease over the wire: what the fake API server ends up with, through every fault it has."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.apiserver import FakeApiServer
from tests.apiserver_store import ApiError, Resource
from tests.following import BOUND, eventually
from xds import kube, kube_lease, kube_writer, lease, reflector, write_queue
from xds.api_wire import Failure
from xds.kube import KubernetesSource
from xds.kube_client import connect
from xds.kube_writer import Options, StatusWriter, observes
from xds.metrics import Metrics
from xds.model import CORE, GATEWAY, ObjectRef
from xds.resolve import CONTROLLER_NAMES, resolve

OURS = CONTROLLER_NAMES[0]
LEASE = ("default", "writers")
ADDRESS = ("IPAddress", "10.0.0.1")
SERVICE = ObjectRef(CORE, "Service", "default", "envoys")
PATCHED = ("gatewayclasses", "gateways", "httproutes", "inferencepools", "inferencemodels")

API = f"{GATEWAY}/v1"
V1, X = "inference.networking.k8s.io/v1", "inference.networking.x-k8s.io/v1alpha2"


def set_quick(monkeypatch: pytest.MonkeyPatch, *changes: tuple[Any, str, float]) -> None:
    """Tenths of seconds where in real life there are seconds."""
    usual = (
        (reflector, "FIRST_DELAY", 0.04),
        (reflector, "WATCH", 1.0),
        (kube, "LOOK", 0.2),
        (kube, "LOOK_AGAIN", 0.05),
        (kube, "HOLD_OFF", 0.02),
        (lease, "RETRY", 0.1),
        (kube_writer, "EVENT_SPACING", 0.0),
        (kube_writer, "EVENT_DELAY", 0.05),
        (write_queue, "SPACING", 0.05),
        (write_queue, "FIRST_DELAY", 0.03),
        (write_queue, "LONGEST_DELAY", 0.2),
    )
    for module, name, value in (*usual, *changes):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApiServer]:
    set_quick(monkeypatch)
    async with FakeApiServer() as api:
        yield api


@pytest.fixture
def kubeconfig(api: FakeApiServer, tmp_path: Path) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(api.kubeconfig())
    return path


class Replica:
    """A source and a writer, and between them what control does: every Config becomes statuses."""

    def __init__(self, client: Any, name: str) -> None:
        self.metrics = Metrics()
        self.source = KubernetesSource(client, self.metrics, jitter=lambda: 0.0, observe=observes(SERVICE))
        options = Options(LEASE, name, CONTROLLER_NAMES, (ADDRESS,), SERVICE)
        self.writer = StatusWriter(client, self.source.live, options, self.metrics, jitter=lambda: 0.0)
        self.source.follow_live(self.writer.observed)
        self.configs = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group, aclosing(self.source.configs()) as configs:
            group.create_task(self.writer.run())
            async for config in configs:
                topology = resolve(config)
                self.writer.follow(topology.statuses, (*config.rejections, *topology.rejections))
                self.configs += 1

    def writes(self, result: str = "written", kinds: Iterable[str] = ("Gateway", "HTTPRoute", "GatewayClass")) -> float:
        labels = [{"kind": kind, "result": result} for kind in kinds]
        return sum(
            self.metrics.registry.get_sample_value("vllm_xds_status_writes_total", each) or 0.0 for each in labels
        )

    def events(self, result: str) -> float:
        return self.metrics.registry.get_sample_value("vllm_xds_events_total", {"result": result}) or 0.0

    async def settled(self) -> None:
        """It is the holder, and has looked at everything."""
        await eventually(lambda: self.writer.lease.leads() and self.configs and not self.writer.pending)


@asynccontextmanager
async def replica(kubeconfig: Path, name: str = "a") -> AsyncIterator[Replica]:
    """Ends as a process does that is asked to; a mistake of its tasks is raised here."""
    async with aclosing(await connect(str(kubeconfig))) as client:
        one = Replica(client, name)
        task = asyncio.create_task(one.run())
        try:
            yield one
        finally:
            task.cancel()
            [ended] = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(ended, asyncio.CancelledError), ended


# --- objects ---


def gateway_class(name: str = "c", controller: str = OURS) -> dict[str, Any]:
    return {
        "apiVersion": API,
        "kind": "GatewayClass",
        "metadata": {"name": name},
        "spec": {"controllerName": controller},
    }


def gateway(name: str = "gw", port: int = 80, class_name: str = "c", **listener: Any) -> dict[str, Any]:
    listeners = [{"name": "http", "port": port, "protocol": "HTTP", **listener}]
    spec = {"gatewayClassName": class_name, "listeners": listeners}
    return {"apiVersion": API, "kind": "Gateway", "metadata": {"name": name}, "spec": spec}


def route(name: str = "r", *parents: str, backend: Any = None, **spec: Any) -> dict[str, Any]:
    refs = [{"name": each} for each in parents or ("gw",)]
    rules = [{"backendRefs": [backend or {"name": "web", "port": 80}]}]
    return {
        "apiVersion": API,
        "kind": "HTTPRoute",
        "metadata": {"name": name},
        "spec": {"parentRefs": refs, "rules": rules, **spec},
    }


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"ports": [{"port": 80}], **spec},
    }


def put(api: FakeApiServer, *documents: dict[str, Any]) -> None:
    """As people and their tools do: a status that is there stays."""
    for document in documents:
        table = api.store.table(document["kind"], document["apiVersion"].rpartition("/")[0])
        namespace = "default" if table.resource.namespaced else ""
        key = (namespace, document["metadata"]["name"])
        status = api.store.get(table, key).get("status") if key in table.objects else None
        api.store.put({**({"status": status} if status else {}), **document})


def get(api: FakeApiServer, kind: str, name: str, group: str = GATEWAY) -> dict[str, Any]:
    table = api.store.table(kind, group)
    return api.store.get(table, ("default" if table.resource.namespaced else "", name))


def said(conditions: Iterable[Any]) -> dict[str, tuple[str, str]]:
    return {each["type"]: (each["status"], each["reason"]) for each in conditions}


def parents(api: FakeApiServer, name: str = "r") -> dict[str, dict[str, tuple[str, str]]]:
    """What our entries of a route say, by Gateway."""
    entries = get(api, "HTTPRoute", name).get("status", {}).get("parents", ())
    return {e["parentRef"]["name"]: said(e["conditions"]) for e in entries if e["controllerName"] == OURS}


def patches(api: FakeApiServer) -> int:
    return sum(api.requests.count(f"patch {plural}") for plural in PATCHED)


def spec_of_lease(api: FakeApiServer) -> dict[str, Any]:
    return dict(get(api, "Lease", LEASE[1], "coordination.k8s.io")["spec"])


def holder(api: FakeApiServer) -> str:
    table = api.store.table("Lease")
    return str(spec_of_lease(api)["holderIdentity"]) if (LEASE[0], LEASE[1]) in table.objects else ""


GOOD = {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")}
WHOLE = (gateway_class(), gateway(), service(), route())


# --- what is written --------------------------------------------------------------------------------------------------


async def test_every_kind_is_written_once(api: FakeApiServer, kubeconfig: Path) -> None:
    """With each kind's own spelling; a second process, which looks at everything anew, writes nothing."""
    selector = {"selector": {"matchLabels": {"a": "b"}}, "targetPorts": [{"number": 8000}]}
    put(api, *WHOLE)
    meta, poolref = {"metadata": {"name": "p"}}, {"modelName": "m", "poolRef": {"name": "p"}}
    for version, name, spec in ((V1, "v1", selector), (X, "p", {"selector": {"a": "b"}, "targetPortNumber": 1})):
        put(api, {"apiVersion": version, "kind": "InferencePool", "metadata": {"name": name}, "spec": spec})
        backend = {"group": version.rpartition("/")[0], "kind": "InferencePool", "name": name}
        put(api, route(f"to-{name}", backend=backend))
    put(api, {"apiVersion": X, "kind": "InferenceModel", **meta, "spec": poolref})
    async with replica(kubeconfig) as one:
        await one.settled()
        assert said(get(api, "GatewayClass", "c")["status"]["conditions"]) == {"Accepted": ("True", "Accepted")}
        status = get(api, "Gateway", "gw")["status"]
        assert said(status["conditions"])["Programmed"] == ("True", "Programmed")
        assert status["addresses"] == [{"type": "IPAddress", "value": "10.0.0.1"}]
        assert status["listeners"][0]["attachedRoutes"] == 3
        assert parents(api) == {"gw": GOOD}
        (entry,) = get(api, "InferencePool", "v1", "inference.networking.k8s.io")["status"]["parents"]
        assert (entry["controllerName"], said(entry["conditions"])) == (OURS, GOOD)
        (entry,) = get(api, "InferencePool", "p", "inference.networking.x-k8s.io")["status"]["parent"]
        assert ("controllerName" in entry, said(entry["conditions"])) == (False, GOOD)
        model = get(api, "InferenceModel", "p", "inference.networking.x-k8s.io")
        assert said(model["status"]["conditions"]) == {"Accepted": ("True", "Accepted"), "Ready": ("True", "Ready")}
        assert patches(api) == 8
    revision = api.store.revision
    async with replica(kubeconfig, "b") as two:
        await two.settled()
        assert patches(api) == 8
    assert api.store.revision > revision  # the Lease, and nothing else
    assert not any(two.writes(result) for result in ("written", "conflict", "failed"))


async def test_what_changes_is_written(api: FakeApiServer, kubeconfig: Path) -> None:
    """With the new generation; a status is not touched by a change that it does not tell of."""
    put(api, *WHOLE)
    async with replica(kubeconfig) as one:
        await one.settled()
        before = get(api, "Gateway", "gw")["status"]["listeners"][0]["conditions"]
        put(api, route(parentRefs=[{"name": "gw", "sectionName": "missing"}]))
        await eventually(lambda: parents(api)["gw"]["Accepted"] == ("False", "NoMatchingParent"))
        entry = get(api, "HTTPRoute", "r")["status"]["parents"][0]
        assert entry["parentRef"]["sectionName"] == "missing"
        assert {each["observedGeneration"] for each in entry["conditions"]} == {2}
        await eventually(lambda: get(api, "Gateway", "gw")["status"]["listeners"][0]["attachedRoutes"] == 0)
        assert get(api, "Gateway", "gw")["status"]["listeners"][0]["conditions"] == before
        await one.settled()
        written = patches(api)
        put(api, service("unrelated"))
        await eventually(lambda: one.configs >= 3)
        await one.settled()
        assert patches(api) == written


async def test_others_are_left_alone(api: FakeApiServer, kubeconfig: Path) -> None:
    """Their entries, their conditions, their Gateways; our entry goes with its parentRef."""
    theirs = {"controllerName": "istio.io/x", "parentRef": {"name": "theirs"}, "conditions": [{"type": "Accepted"}]}
    seeded = {"type": "example.com/Seeded", "status": "True", "reason": "Seeded"}
    put(api, *WHOLE, gateway_class("istio", "istio.io/x"), gateway("theirs", 81, "istio"), gateway("more", 82))
    put(api, route("r", "theirs", "gw", "more") | {"status": {"parents": [theirs]}})
    put(api, gateway() | {"status": {"conditions": [seeded]}})
    async with replica(kubeconfig) as one:
        await one.settled()
        assert parents(api) == {"gw": GOOD, "more": GOOD}
        put(api, route("r", "theirs", "more"))
        await eventually(lambda: parents(api) == {"more": GOOD})
        assert get(api, "HTTPRoute", "r")["status"]["parents"][0] == theirs
        assert get(api, "Gateway", "gw")["status"]["conditions"][0] == seeded
        assert "status" not in get(api, "Gateway", "theirs")
        put(api, route("r", "theirs"))
        await eventually(lambda: get(api, "HTTPRoute", "r")["status"]["parents"] == [theirs])


async def test_a_refused_version(api: FakeApiServer, kubeconfig: Path) -> None:
    """It is not accepted at its generation, in whatever of it is served, and accepted again with the next good one."""
    put(api, *WHOLE)
    async with replica(kubeconfig):
        await eventually(lambda: parents(api) == {"gw": GOOD})
        put(api, route(hostnames=["Bad"]))
        await eventually(lambda: parents(api) == {"gw": {"Accepted": ("False", "UnsupportedValue")}})
        (condition,) = get(api, "HTTPRoute", "r")["status"]["parents"][0]["conditions"]
        assert condition["observedGeneration"] == 2
        assert condition["message"].startswith("spec.hostnames[0]: ")
        assert condition["message"].endswith("its last good version is served")
        put(api, route())
        await eventually(lambda: parents(api) == {"gw": GOOD})


async def test_addresses_follow_the_service(api: FakeApiServer, kubeconfig: Path) -> None:
    """Beside those of the flag: what its load balancer is given, and when it is given another."""
    put(api, *WHOLE, service("envoys", type="LoadBalancer"))

    def addresses() -> list[str]:
        return [each["value"] for each in get(api, "Gateway", "gw").get("status", {}).get("addresses", ())]

    async with replica(kubeconfig) as one:
        await eventually(lambda: addresses() == ["10.0.0.1"])
        for ip in ("10.0.0.7", "10.0.0.8"):
            balanced = {"status": {"loadBalancer": {"ingress": [{"ip": ip}]}}}
            put(api, service("envoys", type="LoadBalancer") | balanced)
            await eventually(lambda ip=ip: addresses() == ["10.0.0.1", ip])  # type: ignore[misc]
        await one.settled()
        assert one.writes("written", ["Gateway"]) == 3


async def test_the_version_of_the_crds_is_followed(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what their annotation says; without the right to read it there is no such condition."""
    monkeypatch.setattr(kube_writer, "LOOK", 0.05)
    put(api, gateway_class())

    def says() -> tuple[str, str] | None:
        return said(get(api, "GatewayClass", "c").get("status", {}).get("conditions", ())).get("SupportedVersion")

    kind = "CustomResourceDefinition"
    definitions = Resource("apiextensions.k8s.io", ("v1",), kind, "customresourcedefinitions", namespaced=False)
    async with replica(kubeconfig) as one:
        await one.settled()
        assert says() is None
        api.store.install(definitions)
        for annotations, status in (
            ({"gateway.networking.k8s.io/bundle-version": "v1.6.1"}, ("True", "SupportedVersion")),
            ({}, ("False", "UnsupportedVersion")),
            ({"gateway.networking.k8s.io/bundle-version": "v0.0.0"}, ("False", "UnsupportedVersion")),
            ({"gateway.networking.k8s.io/bundle-version": "v1.2.0"}, ("True", "SupportedVersion")),
        ):
            about = {"name": "gatewayclasses.gateway.networking.k8s.io", "annotations": annotations}
            head = {"apiVersion": "apiextensions.k8s.io/v1", "kind": kind}
            api.store.put(head | {"metadata": about})
            await eventually(lambda status=status: says() == status)  # type: ignore[misc]
        api.forbidden.add(("get", "customresourcedefinitions"))
        await eventually(lambda: api.requests.count("get customresourcedefinitions") >= 6)
        assert says() == ("True", "SupportedVersion")


async def test_many_changes_are_no_storm(api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred routes are written once each, a few at a time; their Gateway, which counts them, a few times."""
    monkeypatch.setattr(write_queue, "PACE", 0.001)
    put(api, *WHOLE[:3])
    async with replica(kubeconfig) as one:
        await one.settled()
        api.faults.delay = 0.01
        before = one.writes("written", ["Gateway"])
        put(api, *(route(f"r{i}") for i in range(200)))
        await eventually(lambda: get(api, "Gateway", "gw")["status"]["listeners"][0]["attachedRoutes"] == 200)
        await one.settled()
        assert one.writes("written", ["HTTPRoute"]) == 200
        assert one.writes("written", ["Gateway"]) - before < 20
        assert one.writes("conflict") == 0
    assert api.at_once["PATCH"] in (kube_writer.WRITERS, kube_writer.WRITERS + 1)  # that of the Lease


async def test_own_writes_are_no_conflict(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written again before the watch has told of the last time is made from what the answer to that said."""
    monkeypatch.setattr(write_queue, "SPACING", 0.0)
    put(api, *WHOLE)
    async with replica(kubeconfig) as one:
        await one.settled()
        api.faults.delay = 0.05
        for i in range(8):
            if i % 2:
                put(api, service())
            else:
                api.store.delete(api.store.table("Service"), ("default", "web"))
            await asyncio.sleep(0.06)
        await eventually(lambda: parents(api) == {"gw": GOOD})
        await one.settled()
        assert one.writes("written", ["HTTPRoute"]) >= 3
        assert one.writes("conflict") == 0


async def test_a_war_is_not_joined(api: FakeApiServer, kubeconfig: Path) -> None:
    """Another program that overwrites what is ours is answered ever more slowly, and named in the log once."""
    put(api, *WHOLE)
    with capture_logs() as logs:
        async with replica(kubeconfig) as one:
            await one.settled()

            def undo() -> int:
                if get(api, "GatewayClass", "c")["status"] == {"conditions": []}:
                    return 0
                api.store.put(gateway_class() | {"status": {"conditions": []}})
                return 1

            undone, began = 0, time.monotonic()
            while time.monotonic() < began + 1.5:
                undone += undo()
                await asyncio.sleep(0.01)
            assert 3 <= undone <= 7  # 0.1, 0.2, 0.4, 0.8 s apart
    assert [each["object"] for each in logs if each["event"] == "status contested"] == ["GatewayClass c"]


# --- Events -----------------------------------------------------------------------------------------------------------


def events(api: FakeApiServer) -> list[tuple[str, str, str]]:
    table = api.store.table("Event", "events.k8s.io")
    found = [api.store.get(table, key) for key in table.objects]
    return sorted((each["regarding"]["kind"], each["regarding"]["name"], each["reason"]) for each in found)


async def test_rejections_of_our_objects_are_events(api: FakeApiServer, kubeconfig: Path) -> None:
    """Once, whoever tells them: on the object, with its path and message; on nothing of others."""
    put(api, *WHOLE, gateway_class("istio", "istio.io/x"), gateway("theirs", 81, "istio"))
    put(api, route(hostnames=["Bad"]), route("lost", backend={"name": "missing", "port": 1}), route("other", "theirs"))
    put(api, route("none", "missing"))
    expected = [("HTTPRoute", "lost", "BackendNotFound"), ("HTTPRoute", "r", "Invalid")]
    for name in ("a", "b"):
        async with replica(kubeconfig, name) as one:
            await eventually(lambda: events(api) == expected)
            await eventually(lambda one=one: one.events("written") == 2)  # type: ignore[misc]
    table = api.store.table("Event", "events.k8s.io")
    event = next(e for k in table.objects if (e := api.store.get(table, k))["regarding"]["name"] == "r")
    uid = get(api, "HTTPRoute", "r")["metadata"]["uid"]
    about = {"apiVersion": API, "kind": "HTTPRoute", "namespace": "default", "name": "r", "uid": uid}
    assert event["regarding"] == about
    assert event["note"].startswith("spec.hostnames[0]: expected")
    assert (event["type"], event["reportingController"], event["action"]) == ("Warning", "vllm-xds", "Configure")
    assert event["eventTime"].endswith("Z")


async def test_events_that_are_refused(api: FakeApiServer, kubeconfig: Path) -> None:
    """It is said once and stops no status; what could not be told for want of an answer is told later."""
    put(api, *WHOLE, route("lost", backend={"name": "missing", "port": 1}))
    api.fail(ApiError(500, "InternalError", "boom"), "create", "events", times=3)
    with capture_logs() as logs:
        async with replica(kubeconfig) as one:
            await one.settled()
            assert parents(api) == {"gw": GOOD}
            await eventually(lambda: events(api) == [("HTTPRoute", "lost", "BackendNotFound")])
            api.forbidden.add(("create", "events"))
            put(api, route("more", backend={"name": "missing", "port": 1}))
            await eventually(lambda: one.events("failed") == 4)
    told = [(e["event"], e["reason"]) for e in logs if e.get("what") == "events"]
    assert told == [
        ("write failed", "InternalError"),
        ("write recovered", "InternalError"),
        ("write failed", "Forbidden"),
    ]


# --- faults -----------------------------------------------------------------------------------------------------------


def _errors(error: ApiError, times: int = 4) -> Callable[[FakeApiServer], Any]:
    async def fault(api: FakeApiServer) -> None:
        api.fail(error, "patch", "httproutes", times)

    return fault


async def _restart(api: FakeApiServer) -> None:
    await api.restart()


async def _away(api: FakeApiServer) -> None:
    await api.stop()
    asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(api.start()))


async def _slow(api: FakeApiServer) -> None:
    api.faults.delay = 0.05


async def _drop(api: FakeApiServer) -> None:
    api.drop()


FAULTS = {
    "409": _errors(ApiError(409, "Conflict", "modified")),
    "404": _errors(ApiError(404, "NotFound", "gone")),
    "422": _errors(ApiError(422, "Invalid", "no")),
    "429": _errors(ApiError(429, "TooManyRequests", "later")),
    "500": _errors(ApiError(500, "InternalError", "boom")),
    "403": _errors(ApiError(403, "Forbidden", "no")),
    "restart": _restart,
    "away": _away,
    "slow": _slow,
    "dropped": _drop,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_after_any_fault_all_is_said(fault: Any, api: FakeApiServer, kubeconfig: Path) -> None:
    """The last of several changes, and nothing that was true only in between."""
    put(api, *WHOLE)
    async with replica(kubeconfig) as one:
        await one.settled()
        await fault(api)
        for names in (("gw", "x"), ("x",), ("gw",)):
            put(api, gateway("x", 81), route("r", *names), route("s", *names))
            await asyncio.sleep(0.01)
        put(api, route("r", "x"), route("s", "x", backend={"name": "missing", "port": 80}))
        unresolved = {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("False", "BackendNotFound")}
        await eventually(lambda: parents(api) == {"x": GOOD})
        await eventually(lambda: parents(api, "s") == {"x": unresolved})
        await eventually(lambda: get(api, "Gateway", "x")["status"]["listeners"][0]["attachedRoutes"] == 2)


async def test_an_object_that_goes_is_let_go(api: FakeApiServer, kubeconfig: Path) -> None:
    """It is deleted while its status is being written: nothing waits for it, and one with its name begins anew."""
    put(api, *WHOLE)
    async with replica(kubeconfig) as one:
        await one.settled()
        api.faults.delay = 0.1
        put(api, route("r", "missing"))
        api.store.delete(api.store.table("HTTPRoute"), ("default", "r"))
        await eventually(lambda: one.configs >= 3)
        api.faults.delay = 0.0
        await one.settled()
        put(api, route())
        await eventually(lambda: parents(api) == {"gw": GOOD})


@pytest.mark.parametrize(
    ("error", "of"),
    [
        (ApiError(403, "Forbidden", "no right"), "HTTPRoute"),
        (ApiError(422, "Invalid", "no"), "HTTPRoute default/r"),
        (ApiError(500, "InternalError", "boom"), None),
    ],
)
async def test_faults_are_told_once(error: ApiError, of: str | None, api: FakeApiServer, kubeconfig: Path) -> None:
    """When they begin and when they are over: of everything, of a kind that may not be written, or of an object."""
    put(api, *WHOLE)
    api.fail(error, "patch", "httproutes", times=3)
    with capture_logs() as logs:
        async with replica(kubeconfig) as one:
            await eventually(lambda: one.writes("failed") == 3 and parents(api) == {"gw": GOOD})
            await one.settled()
    told = [(e["event"], e["reason"], e.get("object")) for e in logs if e.get("what") == "statuses"]
    assert told[:1] == [("write failed", error.reason, of)]
    assert told[-1:] == [("write recovered", error.reason, of)]
    if of is not None:  # what is about all is over with any write
        assert len(told) == 2


# --- the Lease --------------------------------------------------------------------------------------------------------


async def test_the_lease_of_a_holder(api: FakeApiServer, kubeconfig: Path) -> None:
    """It is as client-go has it, renewed, keeps what others put on it, and is given back at the end."""
    put(api, *WHOLE)
    with capture_logs() as logs:
        async with replica(kubeconfig) as one:
            await one.settled()
            first = spec_of_lease(api)
            assert (first["holderIdentity"], first["leaseDurationSeconds"], first["leaseTransitions"]) == ("a", 15, 0)
            table = api.store.table("Lease")
            api.store.merge(table, LEASE, {"metadata": {"labels": {"x": "y"}}})
            await eventually(lambda: spec_of_lease(api)["renewTime"] > first["renewTime"])
            assert spec_of_lease(api)["acquireTime"] == first["acquireTime"]
            assert api.store.get(table, LEASE)["metadata"]["labels"] == {"x": "y"}
    assert (holder(api), spec_of_lease(api)["leaseDurationSeconds"]) == ("", 1)
    told = [e for e in logs if e["event"].startswith("leadership")]
    assert [e["event"] for e in told] == ["leadership acquired", "leadership released"]
    assert told[-1]["answered"]


async def test_a_lease_that_is_given_back_is_taken_at_once(api: FakeApiServer, kubeconfig: Path) -> None:
    """Of two replicas one writes; when it stops in order, the other does within a moment."""
    put(api, *WHOLE)
    async with AsyncExitStack() as stack:
        async with replica(kubeconfig, "a") as one:
            await one.settled()
            two = await stack.enter_async_context(replica(kubeconfig, "b"))
            await eventually(lambda: two.configs and two.writer.lease.holder == "a")
            assert not two.writer.lease.leads()
        await two.settled()
        assert holder(api) == "b"
        assert two.writes() == 0
        put(api, route("r", "missing"))
        await eventually(lambda: parents(api) == {})
        assert two.writes() >= 1


@pytest.mark.parametrize("verbs", [("get", "create"), ("create",)])
async def test_without_the_lease_nothing_is_written(
    verbs: tuple[str, ...], api: FakeApiServer, kubeconfig: Path
) -> None:
    """Its API is refused to this user: it is said once, also when only writing is; everything else goes on."""
    put(api, *WHOLE)
    api.forbidden |= {(verb, "leases") for verb in verbs}
    with capture_logs() as logs:
        async with replica(kubeconfig) as one:
            await eventually(lambda: api.requests.count("get leases") >= 3)
            await eventually(lambda: one.configs)
            assert patches(api) == 0
            api.forbidden.clear()
            await one.settled()
            assert parents(api) == {"gw": GOOD}
    told = [(e["event"], e["reason"]) for e in logs if e.get("what") == "lease"]
    assert told == [("write failed", "Forbidden"), ("write recovered", "Forbidden")]


async def test_nothing_is_sent_when_the_time_is_over(api: FakeApiServer, kubeconfig: Path) -> None:
    """A process may have stood still between its look at the clock and the write: that is not begun, and says why."""
    async with aclosing(await connect(str(kubeconfig))) as client:
        writer = StatusWriter(client, {}, Options(LEASE, "a", CONTROLLER_NAMES), Metrics())
        answer = await writer._send("PATCH", "/api/v1/namespaces/default/services/web", {})
        assert answer == Failure("Timeout", "the Lease is another's by now")
        assert await client.get("/readyz", {}, 5.0, text=True) == b"ok"  # whatever was sent has arrived
    assert api.requests == []


SHORT = ((lease, "DURATION", 2), (lease, "TENURE", 1.2), (lease, "ANSWER", 0.4), (kube_lease, "ANSWER", 0.4))


class Thread:
    """A replica in a thread with an event loop of its own, which can stand still like a process that is stopped."""

    def __init__(self, kubeconfig: Path, name: str) -> None:
        self.replica: Replica | None = None
        self._kubeconfig, self._name = kubeconfig, name
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with replica(self._kubeconfig, self._name) as self.replica:
            await self._end.wait()

    def freeze(self, until: threading.Event) -> None:
        self._loop.call_soon_threadsafe(until.wait, BOUND)

    def __enter__(self) -> Thread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def writes(self) -> float:
        return self.replica.writes() if self.replica else 0.0

    @property
    def leads(self) -> bool:
        return bool(self.replica and self.replica.writer.lease.leads())


async def test_a_holder_that_stands_still_has_lost(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes over; when the first goes on, it writes nothing before it is told that it is not the holder."""
    set_quick(monkeypatch, *SHORT)
    put(api, *WHOLE)
    on = threading.Event()
    with Thread(kubeconfig, "a") as first:
        try:
            await eventually(lambda: first.leads and parents(api) == {"gw": GOOD})
            async with replica(kubeconfig, "b") as second:
                await eventually(lambda: second.configs)
                first.freeze(on)
                written = first.writes
                put(api, route("r", "x"), gateway("x", 81))
                await second.settled()
                await eventually(lambda: parents(api) == {"x": GOOD})
                assert not first.leads
                put(api, route("r", "gw"))
                on.set()
                await eventually(lambda: parents(api) == {"gw": GOOD})
                await eventually(lambda: first.replica and first.replica.writer.lease.holder == "b")
                assert first.writes == written
                assert holder(api) == "b"
        finally:
            on.set()


async def test_a_holder_without_an_answer_stops_before_another_begins(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API server hangs for both; nobody writes for a while, then one does, and never two at a time."""
    set_quick(monkeypatch, *SHORT, (write_queue, "PACE", 0.0))
    put(api, *WHOLE)
    async with replica(kubeconfig, "a") as one, replica(kubeconfig, "b") as two:
        await eventually(lambda: one.writer.lease.leads() or two.writer.lease.leads())
        both = []

        async def watch() -> None:
            while True:
                both.append((one.writer.lease.leads(), two.writer.lease.leads()))
                await asyncio.sleep(0.005)

        watching = asyncio.ensure_future(watch())
        for _ in range(2):
            api.hang()
            await eventually(lambda: not one.writer.lease.leads() and not two.writer.lease.leads())
            api.drop()
            api.resume()
            await eventually(lambda: one.writer.lease.leads() or two.writer.lease.leads())
        watching.cancel()
        assert (True, True) not in both
        put(api, route("r", "x"), gateway("x", 81))
        await eventually(lambda: parents(api) == {"x": GOOD})
