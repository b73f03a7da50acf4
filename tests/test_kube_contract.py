"""What we take for true of an API server: against the fake one, and the same against a real one.

    KUBECONFIG_FOR_TESTS=~/.kube/config make test ARGS="tests/test_kube_contract.py"

The tests make namespaces of their own, named vllm-xds-test-*, and delete them; the user needs to be allowed that.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kubernetes_asyncio.client.exceptions import ApiException

from tests.apiserver import APPLY, MERGE, FakeApiServer
from tests.following import eventually, following
from xds import lease
from xds.api_wire import Failure, Item, Page, Served, choose, group_versions, read_event, read_page
from xds.events import event
from xds.kube import KubernetesSource
from xds.kube_client import Client, connect
from xds.kube_writer import Options as WriterOptions
from xds.kube_writer import StatusWriter, observes
from xds.metrics import Metrics
from xds.model import GATEWAY, ObjectRef, Rejection
from xds.parse import KINDS
from xds.resolve import resolve
from xds.status_patch import patch, read_live

REAL = "KUBECONFIG_FOR_TESTS"
LONG = 20.0  # seconds for one answer
SERVICES = Served("", "v1", "Service", "services", namespaced=True)
FUTURE = "9999999999999"  # a resourceVersion no server has reached

pytestmark = pytest.mark.timeout(120)  # seconds: a real server may be far away


class Cluster:
    """An API server, real or not, and one namespace in it that is the test's own."""

    def __init__(self, kubeconfig: Path, client: Client, namespace: str) -> None:
        self.kubeconfig, self.client, self.namespace = kubeconfig, client, namespace

    @property
    def services(self) -> str:
        return SERVICES.path(self.namespace)

    def path(self, plural: str, group: str = "", version: str = "v1", name: str = "") -> str:
        path = Served(group, version, "", plural, namespaced=True).path(self.namespace)
        return f"{path}/{name}" if name else path

    async def write(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str
    ) -> Any:
        """The decoded answer; raises ApiException for a refusal."""
        value, _, _ = await self.client._api.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
            response_types_map={200: "object", 201: "object", 202: "object"},
        )
        return value

    async def service(self, name: str, port: int = 80) -> Any:
        value = {"metadata": {"name": name}, "spec": {"ports": [{"port": port}], "selector": {"app": name}}}
        return await self.write("POST", self.services, {"apiVersion": "v1", "kind": "Service"} | value)

    async def page(self, path: str, **query: object) -> Page:
        page = read_page(await self.client.get(path, query, LONG), SERVICES)
        assert isinstance(page, Page), page
        return page

    async def lines(self, path: str, seconds: int = 2, **query: object) -> list[Any]:
        """Of a watch, until the server ends it."""
        watch = {"watch": "true", "timeoutSeconds": seconds, **query}
        async with aclosing(self.client.lines(path, watch, seconds + LONG)) as lines:
            return [line async for line in lines]


@pytest.fixture(params=["fake", "real"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    real = os.environ.get(REAL, "")
    if request.param == "real" and not real:
        pytest.skip(f"{REAL} is not set: no real API server to ask")
    async with FakeApiServer() as api:
        kubeconfig = Path(real)
        if request.param == "fake":
            kubeconfig = tmp_path / "kubeconfig"
            kubeconfig.write_text(api.kubeconfig())
        async with aclosing(await connect(str(kubeconfig))) as client:
            cluster = Cluster(kubeconfig, client, f"vllm-xds-test-{uuid.uuid4().hex[:8]}")
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": cluster.namespace}}
            await cluster.write("POST", "/api/v1/namespaces", namespace)
            try:
                yield cluster
            finally:
                await cluster.write("DELETE", f"/api/v1/namespaces/{cluster.namespace}")


def names(page: Page) -> list[str]:
    return [item.key[1] for item in page.items]


# --- the wire ---


async def test_discovery(cluster: Cluster) -> None:
    """Every built-in kind we read is found, and can be listed and watched."""
    versions = {kind: several for kind, (several, _) in KINDS.items()}
    wanted = group_versions(versions, await cluster.client.get("/apis", {}, LONG))
    assert not isinstance(wanted, Failure)
    lists = {}
    for group, version in wanted:
        path = f"/apis/{group}/{version}" if group else "/api/v1"
        lists[group, version] = await cluster.client.get(path, {}, LONG)
    found = choose(versions, lists)
    assert {kind for _, kind in found} >= {"Pod", "Service", "EndpointSlice"}
    assert found["", "Service"] == SERVICES
    for kind, served in found.items():
        assert served.namespaced == KINDS[kind][1]


async def test_ready(cluster: Cluster) -> None:
    """/readyz is answered with a 200 and a text."""
    assert await cluster.client.get("/readyz", {}, LONG, text=True) == b"ok"


async def test_pages(cluster: Cluster) -> None:
    """A list in pages is of one resourceVersion; what is made in between is not in it."""
    for name in "abc":
        await cluster.service(name)
    first = await cluster.page(cluster.services, limit=2)
    assert names(first) == ["a", "b"]
    assert first.token
    await cluster.service("d")
    second = await cluster.page(cluster.services, **{"limit": 2, "continue": first.token})
    assert (names(second), second.version, second.token) == (["c"], first.version, "")
    assert second.items[0].document["kind"] == "Service"


async def test_watch_from_a_list_tells_everything_after_it(cluster: Cluster) -> None:
    """In order, once; a delete with the object and a newer version; then the server ends it in time."""
    await cluster.service("old")
    page = await cluster.page(cluster.services)
    await cluster.service("new")
    await cluster.write("PATCH", f"{cluster.services}/old", {"metadata": {"labels": {"a": "b"}}}, MERGE)
    await cluster.write("DELETE", f"{cluster.services}/old")
    lines = await cluster.lines(cluster.services, seconds=1, resourceVersion=page.version)
    events = [event for line in lines if not isinstance(event := read_event(line, SERVICES), Failure)]
    assert len(events) == len(lines)
    assert [(e.type, e.item.key[1]) for e in events if e.item] == [
        ("ADDED", "new"),
        ("MODIFIED", "old"),
        ("DELETED", "old"),
    ]
    assert len({e.version for e in events}) == 3


async def test_watch_from_long_ago(cluster: Cluster) -> None:
    """One ERROR line, Expired, inside a 200."""
    await cluster.service("a")
    (line,) = await cluster.lines(cluster.services, resourceVersion="1")
    failure = read_event(line, SERVICES)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.status) == ("Expired", 410)


async def test_watch_from_the_future(cluster: Cluster) -> None:
    """Silence, and the end in time: not of what happens meanwhile either."""
    watching = asyncio.ensure_future(cluster.lines(cluster.services, resourceVersion=FUTURE))
    await cluster.service("a")
    assert await watching == []


async def test_refusals(cluster: Cluster) -> None:
    """A path nobody has, a version of the future, one that is none: with the status and reason we decide by."""
    text = await cluster.client.get("/apis/nope.example.com/v1/foos", {"watch": "1"}, LONG)
    assert text == Failure("NotFound", "HTTP 404: 404 page not found", 404)
    future = await cluster.client.get(cluster.services, {"resourceVersion": FUTURE}, LONG)
    assert isinstance(future, Failure)
    assert (future.status, future.reason, future.retry_after) == (504, "Timeout", 1)
    (bad,) = await cluster.lines(cluster.services, resourceVersion="abc")
    assert isinstance(bad, Failure)
    assert bad.status == 500


async def test_what_status_and_leases_rest_on(cluster: Cluster) -> None:
    """An update from an old version is a 409, one that changes nothing is no new version, a lease can be applied."""
    leases = cluster.path("leases", "coordination.k8s.io")
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "lock"}}
    made = await cluster.write("POST", leases, lease | {"spec": {"holderIdentity": "a"}})
    taken = await cluster.write("PUT", f"{leases}/lock", made | {"spec": {"holderIdentity": "b"}})
    with pytest.raises(ApiException) as refused:
        await cluster.write("PUT", f"{leases}/lock", made | {"spec": {"holderIdentity": "c"}})
    assert refused.value.status == 409
    with pytest.raises(ApiException) as refused:
        await cluster.write("POST", leases, lease)
    assert refused.value.status == 409
    same = await cluster.write("PATCH", f"{leases}/lock", {"spec": {"holderIdentity": "b"}}, MERGE)
    assert same["metadata"]["resourceVersion"] == taken["metadata"]["resourceVersion"]
    applied = lease | {"spec": {"holderIdentity": "d"}}
    query = {"fieldManager": "test", "force": "true"}
    value = await cluster.write("PATCH", f"{leases}/lock", applied, APPLY, **query)
    assert value["spec"]["holderIdentity"] == "d"
    with pytest.raises(ApiException) as refused:
        await cluster.write("PATCH", f"{leases}/lock", {"spec": {}}, "application/json-patch+json")
    assert refused.value.status == 400


async def test_a_status_is_patched_for_one_version(cluster: Cluster) -> None:
    """A merge patch of the status subresource with another resourceVersion is a 409, and changes nothing but it."""
    await _pod(cluster, "p", "127.0.0.2")
    path = f"{cluster.path('pods', name='p')}/status"
    before = await cluster.write("GET", cluster.path("pods", name="p"))

    async def send(version: str, message: str) -> Any:
        body = {"metadata": {"resourceVersion": version, "labels": {"x": "y"}}, "status": {"message": message}}
        return await cluster.client.send("PATCH", path, body, LONG, MERGE)

    after = await send(before["metadata"]["resourceVersion"], "one")
    assert after["status"]["message"] == "one"
    assert after["status"]["podIP"] == "127.0.0.2"
    assert "generation" not in after["metadata"] or after["metadata"]["generation"] == before["metadata"]["generation"]
    refused = await send(before["metadata"]["resourceVersion"], "two")
    assert isinstance(refused, Failure)
    assert (refused.status, refused.reason) == (409, "Conflict")


async def test_an_event_is_there_once(cluster: Cluster) -> None:
    """As we make it, it is accepted; the same again is a 409."""
    await cluster.service("s")
    (item,) = (await cluster.page(cluster.services)).items
    ref = ObjectRef("", "Service", cluster.namespace, "s")
    rejection = Rejection(ref, "Invalid", "expected y " * 200, "spec.z")
    path, body = event(ref, rejection, read_live(item, SERVICES), "tester", datetime.now(UTC))
    made = await cluster.client.send("POST", path, body, LONG)
    assert not isinstance(made, Failure), made
    again = await cluster.client.send("POST", path, body, LONG)
    assert isinstance(again, Failure)
    assert (again.status, again.reason) == (409, "AlreadyExists")


async def test_the_lease_goes_from_one_to_the_other(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Created, renewed and given back by one writer, taken at once by the next."""
    monkeypatch.setattr(lease, "RETRY", 0.2)
    path = cluster.path("leases", "coordination.k8s.io", name="l")
    transitions = []
    for name in ("a", "b"):
        options = WriterOptions((cluster.namespace, "l"), name, ("example.com/x",))
        writer = StatusWriter(cluster.client, {}, options, Metrics())
        task = asyncio.create_task(writer.run())
        await eventually(lambda writer=writer: writer.lease.leads())  # type: ignore[misc]
        spec = (await cluster.write("GET", path))["spec"]
        assert spec["holderIdentity"] == name
        transitions.append(spec["leaseTransitions"])
        await _until(cluster, path, lambda now, then=spec: now["renewTime"] > then["renewTime"])  # type: ignore[misc]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not (await cluster.write("GET", path))["spec"].get("holderIdentity")
    assert transitions == [0, 1]


async def test_statuses_of_gateway_api(cluster: Cluster) -> None:
    """Of a Gateway and its route, where the server has the CRDs: as they validate it, and nothing after that."""
    api, controller = f"{GATEWAY}/v1", f"example.com/{cluster.namespace}"
    found = await cluster.client.get(f"/apis/{api}", {}, LONG)
    if isinstance(found, Failure):
        pytest.skip("this API server has no Gateway API")
    head = {"apiVersion": api, "metadata": {"name": cluster.namespace}}
    classes = f"/apis/{api}/gatewayclasses"
    await cluster.write("POST", classes, head | {"kind": "GatewayClass", "spec": {"controllerName": controller}})
    try:
        listener = {"name": "http", "port": 80, "protocol": "HTTP"}
        spec: Any = {
            "gatewayClassName": cluster.namespace,
            "listeners": [listener, listener | {"name": "s", "port": 81}],
        }
        of = {"apiVersion": api, "metadata": {"name": "x"}}
        await cluster.write("POST", cluster.path("gateways", GATEWAY), of | {"kind": "Gateway", "spec": spec})
        spec = {
            "parentRefs": [{"name": "x", "sectionName": "s"}],
            "rules": [{"backendRefs": [{"name": "n", "port": 1}]}],
        }
        await cluster.write("POST", cluster.path("httproutes", GATEWAY), of | {"kind": "HTTPRoute", "spec": spec})
        metrics = Metrics()
        source = KubernetesSource(cluster.client, metrics, [cluster.namespace], observe=observes(None))
        options = WriterOptions((cluster.namespace, "l"), "a", (controller,), (("IPAddress", "127.0.0.9"),))
        writer = StatusWriter(cluster.client, source.live, options, metrics)
        source.follow_live(writer.observed)

        async def run() -> None:
            async with aclosing(source.configs()) as configs, asyncio.TaskGroup() as group:
                group.create_task(writer.run())
                async for config in configs:
                    writer.follow(resolve(config, [controller]).statuses, ())

        task = asyncio.create_task(run())
        try:
            gateway = cluster.path("gateways", GATEWAY, name="x")
            await _until(cluster, gateway, lambda now: now["listeners"][1]["attachedRoutes"] == 1, "status")
            route = cluster.path("httproutes", GATEWAY, name="x")
            await _until(cluster, route, lambda now: len(now["parents"][0]["conditions"]) == 2, "status")
            await eventually(lambda: not writer.pending)
            for ref, status in writer._wanted.items():  # as the server keeps it, it is what is wanted
                plural = {"GatewayClass": "gatewayclasses", "Gateway": "gateways", "HTTPRoute": "httproutes"}[ref.kind]
                served = Served(GATEWAY, "v1", ref.kind, plural, namespaced=ref.kind != "GatewayClass")
                value = await cluster.write("GET", f"{served.path(ref.namespace)}/{ref.name}")
                item = Item((ref.namespace, ref.name), "", value["metadata"]["resourceVersion"], value)
                again = patch(
                    *(ref, status, read_live(item, served), "2026-01-01T00:00:00Z"),
                    controllers=frozenset({controller}),
                    addresses=options.addresses,
                )
                assert again is None
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    finally:
        await cluster.write("DELETE", f"{classes}/{cluster.namespace}")


async def _until(cluster: Cluster, path: str, true: Callable[[Any], bool], part: str = "spec") -> None:
    """Ask for an object until this holds of a part of it."""
    async with asyncio.timeout(LONG):
        while True:
            value = (await cluster.write("GET", path)).get(part)
            with suppress(LookupError, TypeError):
                if true(value):
                    return
            await asyncio.sleep(0.05)


async def test_loopback_addresses(cluster: Cluster) -> None:
    """A pod's status may have one, an EndpointSlice may not: why a gateway on one machine has no slices."""
    piece = {"metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": [{"addresses": ["127.0.0.2"]}]}
    body = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"} | piece
    with pytest.raises(ApiException) as refused:
        await cluster.write("POST", cluster.path("endpointslices", "discovery.k8s.io"), body)
    assert refused.value.status == 422
    await _pod(cluster, "p", "127.0.0.2")


# --- the source ---


async def test_the_source_follows(cluster: Cluster) -> None:
    """What is there, comes, changes and goes; a pod that is being deleted is told before it is gone."""
    await cluster.service("a")
    await _pod(cluster, "p", "127.0.0.2")
    async with following(cluster.kubeconfig, [cluster.namespace]) as follower:
        config = await follower.until(lambda _: True)
        assert [each.meta.ref.name for each in config.services] == ["a"]
        assert [(each.ip, each.ready, each.deleting) for each in config.pods] == [("127.0.0.2", True, False)]
        await cluster.service("b", 81)
        await follower.until(lambda config: len(config.services) == 2)
        patch = {"spec": {"ports": [{"port": 82}]}}
        await cluster.write("PATCH", f"{cluster.services}/b", patch, MERGE)
        await follower.until(lambda config: config.services[-1].ports[0].port == 82)
        await cluster.write("DELETE", f"{cluster.services}/a")
        await follower.until(lambda config: [each.meta.ref.name for each in config.services] == ["b"])
        path = cluster.path("pods", name="p")
        await cluster.write("DELETE", path)
        await follower.until(lambda config: config.pods[0].deleting and config.pods[0].ready)
        await cluster.write("DELETE", path, gracePeriodSeconds="0")
        await follower.until(lambda config: not config.pods)


async def test_the_source_finds_what_a_cut_connection_hid(cluster: Cluster, tmp_path: Path) -> None:
    """Connections are cut while objects come and go; afterwards nothing is missing and nothing too many."""
    await cluster.service("goes")
    proxied = tmp_path / "proxied"
    async with _proxy(cluster.kubeconfig, proxied) as proxy, following(proxied, [cluster.namespace]) as follower:
        await follower.until(lambda config: len(config.services) == 1)
        proxy.refuse()
        await cluster.write("DELETE", f"{cluster.services}/goes")
        await cluster.service("comes")
        await eventually(lambda: follower.failures("Unreachable", "services") >= 2)
        assert follower.config is not None
        assert [each.meta.ref.name for each in follower.config.services] == ["goes"]
        proxy.accept()
        await follower.until(lambda config: [each.meta.ref.name for each in config.services] == ["comes"])


async def _pod(cluster: Cluster, name: str, ip: str) -> None:
    """A ready pod on a node that does not exist: with a node, its deletion waits for a kubelet."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    with suppress(ApiException):  # the fake server has no such kind, a real one has it already, from its controller
        await cluster.write("POST", cluster.path("serviceaccounts"), account)
    spec = {"nodeName": "vllm-xds-no-node", "containers": [{"name": "c", "image": "none"}]}
    value = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    await cluster.write("POST", cluster.path("pods"), value)
    status = {"podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}]}
    await cluster.write("PATCH", f"{cluster.path('pods', name=name)}/status", {"status": status}, MERGE)


class _Proxy:
    """A TCP proxy before an API server, which can be cut."""

    def __init__(self) -> None:
        self.host, self.port = "", 0
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()

    def refuse(self) -> None:
        self._open = False
        for writer in self._writers:
            writer.transport.abort()

    def accept(self) -> None:
        self._open = True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection(self.host, self.port)
        self._writers |= {writer, back}
        await asyncio.gather(_pump(reader, back), _pump(there, writer), return_exceptions=True)
        self._writers -= {writer, back}


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def _redirect(kubeconfig: Path, proxied: Path, port: int) -> tuple[str, int]:
    """Write the kubeconfig `proxied`: the same, but for a port of this machine. Returns where the server is."""
    config = yaml.safe_load(kubeconfig.read_text())
    chosen = next(each["context"] for each in config["contexts"] if each["name"] == config["current-context"])
    cluster = next(each["cluster"] for each in config["clusters"] if each["name"] == chosen["cluster"])
    user = next(each["user"] for each in config["users"] if each["name"] == chosen["user"])
    for part in (cluster, user):
        for name in ("certificate-authority", "client-certificate", "client-key", "tokenFile"):
            if name in part:
                part[name] = str(kubeconfig.resolve().parent / part[name])
    server = urlsplit(cluster["server"])
    cluster["server"] = f"{server.scheme}://127.0.0.1:{port}{server.path}"
    if server.scheme == "https":
        cluster.setdefault("tls-server-name", server.hostname)
    proxied.write_text(yaml.safe_dump(config))
    return str(server.hostname), server.port or 443


@asynccontextmanager
async def _proxy(kubeconfig: Path, proxied: Path) -> AsyncIterator[_Proxy]:
    """The kubeconfig `proxied` is the other one, through the proxy."""
    proxy = _Proxy()
    listener = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.host, proxy.port = _redirect(kubeconfig, proxied, listener.sockets[0].getsockname()[1])
    try:
        yield proxy
    finally:
        listener.close()
        proxy.refuse()
