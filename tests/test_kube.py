"""KubernetesSource over the wire: what the fake API server has is what is said, through every fault it can have."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from tests.apiserver import FakeApiServer
from tests.apiserver_store import GATEWAY_API, MODEL_X, POLICY, POOL, ApiError, too_large
from tests.following import eventually, following, pods
from tests.goldens import ROOT
from tests.tls_files import CERTS
from xds import kube, reflector
from xds.directory import DirectorySource
from xds.model import Config, Namespace, Object

POOLS = "inferencepools.inference.networking.k8s.io"


@pytest.fixture
async def api(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeApiServer]:
    """A server, and a source that waits for tenths of seconds where in real life it waits for many seconds."""
    for module, name, seconds in (
        (reflector, "FIRST_DELAY", 0.04),
        (reflector, "ABSENT_FOR", 0.5),
        (reflector, "WATCH", 1.0),
        (reflector, "PROOF", 1.0),
        (reflector, "EARLY", 0.3),
        (kube, "SLACK", 0.3),
        (kube, "LOOK", 0.2),
        (kube, "LOOK_AGAIN", 0.05),
        (kube, "HOLD_OFF", 0.02),
    ):
        monkeypatch.setattr(module, name, seconds)
    async with FakeApiServer() as api:
        yield api


@pytest.fixture
def kubeconfig(api: FakeApiServer, tmp_path: Path) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(api.kubeconfig())
    return path


def pod(name: str, ip: str = "10.0.0.1", **metadata: Any) -> dict[str, Any]:
    status = {"podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **metadata}, "status": status}


def has(*names: str) -> Any:
    return lambda config: pods(config) == sorted(names)


def delete(api: FakeApiServer, kind: str, name: str, namespace: str = "default") -> None:
    api.store.delete(api.store.table(kind), (namespace, name), grace=0)


async def asked(api: FakeApiServer, request: str, count: int = 1) -> None:
    """So many requests of a kind have come in all."""
    await eventually(lambda: api.requests.count(request) >= count)


# --- what is read ---


async def test_the_same_as_of_a_directory(api: FakeApiServer, kubeconfig: Path) -> None:
    """The seed's objects: the API server's Config differs from the directory's only in what a server adds."""
    seed = ROOT / "tests" / "golden" / "seed"
    for document in yaml.safe_load_all((seed / "input.yaml").read_text()):
        api.store.put(document)

    def bare(each: Object) -> Object:
        fields = {name: getattr(each, name) for name in each.__dataclass_fields__ if name != "meta"}
        return fields | {"ref": each.meta.ref, "annotations": each.meta.annotations}  # type: ignore[return-value]

    def everything(config: Config) -> list[str]:
        return sorted(str(bare(each)) for each in config.objects if not isinstance(each, Namespace))

    async with following(kubeconfig) as follower:
        config = await follower.until(lambda _: True)
        assert everything(config) == everything(DirectorySource(seed).load())
        assert config.rejections == ()
        assert all(each.meta.created for each in config.objects)
        assert [each.meta.ref.name for each in config.namespaces] == ["default", "kube-system"]  # a server has some


async def test_nothing_is_said_before_everything_is_read(api: FakeApiServer, kubeconfig: Path) -> None:
    """One resource whose list is refused holds up the first Config; then it is there, whole, in pages."""
    for i in range(kube.PAGE + 1):
        api.store.put(pod(f"p{i}"))
    api.fail(ApiError(500, "InternalError", "boom"), "list", "services", times=4)
    async with following(kubeconfig) as follower:
        await asked(api, "list services", 4)
        assert follower.config is None
        config = await follower.until(lambda _: True)
        assert len(config.pods) == kube.PAGE + 1
        assert api.requests.count("list pods") == 2
        assert follower.configs == 1
        assert follower.value("objects", resource="pods") == kube.PAGE + 1


async def test_changes_are_said(api: FakeApiServer, kubeconfig: Path) -> None:
    """One that comes, changes, goes; a change of what is not read is none; a burst is few Configs and not many."""
    async with following(kubeconfig) as follower:
        await follower.until(has())
        api.store.put(pod("a"))
        await follower.until(has("a"))
        api.store.put(pod("a", "10.0.0.2"))
        await follower.until(lambda config: config.pods[0].ip == "10.0.0.2")
        before = follower.configs
        unread = pod("a", "10.0.0.2", annotations={"other.io/x": "y"}) | {"spec": {"hostname": "x"}}
        unread["status"]["phase"] = "Running"
        del unread["spec"]  # a spec would be a new generation
        api.store.put(unread)
        for i in range(200):
            api.store.put(pod(f"burst-{i}"))
        await follower.until(lambda config: len(config.pods) == 201)
        assert follower.configs - before <= 3
        for i in range(200):
            delete(api, "Pod", f"burst-{i}")
        delete(api, "Pod", "a")
        await follower.until(has())
        assert follower.value("objects", resource="pods") == 0


async def test_a_burst_without_an_end_is_not_waited_out(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that come faster than HOLD_OFF do not keep one from being said for longer than MAX_HOLD_OFF."""
    monkeypatch.setattr(kube, "HOLD_OFF", 5.0)
    monkeypatch.setattr(kube, "MAX_HOLD_OFF", 0.2)
    async with following(kubeconfig) as follower:
        await follower.until(has())
        async with asyncio.timeout(3):
            api.store.put(pod("a"))
            await follower.until(has("a"))


async def test_a_rejected_object_keeps_its_last_good_version(api: FakeApiServer, kubeconfig: Path) -> None:
    """As of a directory; its rejection goes with its repair, or with itself."""
    async with following(kubeconfig) as follower:
        api.store.put(pod("a"))
        await follower.until(has("a"))
        api.store.put(pod("a", "nonsense"))
        config = await follower.until(lambda config: bool(config.rejections))
        assert config.pods[0].ip == "10.0.0.1"
        assert "its last good version is served" in config.rejections[0].message
        api.store.put(pod("a", "10.0.0.3"))
        await follower.until(lambda config: config.pods[0].ip == "10.0.0.3" and not config.rejections)
        api.store.put(pod("b", "nonsense"))
        await follower.until(lambda config: bool(config.rejections))
        delete(api, "Pod", "b")
        await follower.until(lambda config: not config.rejections)


async def test_namespaces(api: FakeApiServer, kubeconfig: Path) -> None:
    """Of the given ones alone, by requests to these alone; cluster-scoped objects are read as ever."""
    for name in ("one", "two", "three"):
        api.store.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        api.store.put(pod(f"in-{name}", namespace=name))
    controller = {"apiVersion": GATEWAY_API[0].api_version("v1"), "kind": "GatewayClass", "metadata": {"name": "c"}}
    api.store.put(controller | {"spec": {"controllerName": "a.b/c"}})
    async with following(kubeconfig, ["one", "two"]) as follower:
        config = await follower.until(has("in-one", "in-two"))
        assert len(config.gateway_classes) == 1
        api.store.put(pod("more", namespace="three"))
        api.store.put(pod("more", namespace="two"))
        await follower.until(has("in-one", "in-two", "more"))
        assert follower.value("objects", resource="pods") == 3
        assert api.requests.count("list pods") == 2
        assert api.requests.count("list gatewayclasses") == 1


async def test_of_secrets_only_certificates_are_read(api: FakeApiServer, kubeconfig: Path) -> None:
    """Others are not even sent, and none at all where they may not be read; a renewed one is another Config."""

    def secret(name: str, of: str, kind: str = "kubernetes.io/tls") -> dict[str, Any]:
        files = {"tls.crt": f"{of}.pem", "tls.key": f"{of}.key"}
        data = {key: b64encode((CERTS / file).read_bytes()).decode() for key, file in files.items()}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": kind, "data": data}

    api.store.put(secret("tls", "first"))
    api.store.put(secret("other", "first", "helm.sh/release.v1"))
    api.forbidden.add(("list", "secrets"))
    async with following(kubeconfig) as follower:
        config = await follower.until(has())
        assert config.secrets == ()
        api.forbidden.clear()
        config = await follower.until(lambda config: bool(config.secrets))
        assert follower.value("objects", resource="secrets") == 1
        assert config.rejections == ()
        api.store.put(secret("other", "second", "helm.sh/release.v1"))
        api.store.put(secret("tls", "second"))
        await follower.until(lambda config: config.secrets[0].certificate == (CERTS / "second.pem").read_bytes())
        assert follower.value("objects", resource="secrets") == 1


# --- which resources there are ---


async def test_the_newest_version_that_is_served(api: FakeApiServer, kubeconfig: Path) -> None:
    """One object of a group with two versions counts once; where only the old one is served, that is read."""
    value = {"kind": "Gateway", "metadata": {"name": "gw"}}
    spec = {"gatewayClassName": "c", "listeners": [{"name": "http", "port": 80, "protocol": "HTTP"}]}
    api.store.put({"apiVersion": "gateway.networking.k8s.io/v1", **value, "spec": spec})
    async with following(kubeconfig) as follower:
        config = await follower.until(lambda config: bool(config.gateways))
        assert len(config.gateways) == 1
        assert api.requests.count("list gateways") == 1
        assert follower.lists("Moved", "gateways.gateway.networking.k8s.io") == 0

        # v1 is gone: the same objects through v1beta1, and none is lost on the way
        tables = api.store.tables
        key = ("gateway.networking.k8s.io", "gateways")
        tables[key].resource = replace(tables[key].resource, versions=("v1beta1",))
        await eventually(lambda: follower.lists("Moved", "gateways.gateway.networking.k8s.io"))
        spec = {"gatewayClassName": "c", "listeners": [{"name": "http", "port": 81, "protocol": "HTTP"}]}
        api.store.put({"apiVersion": "gateway.networking.k8s.io/v1beta1", **value, "spec": spec})
        config = await follower.until(lambda config: config.gateways[0].listeners[0].port == 81)
        assert len(config.gateways) == 1


async def test_a_missing_definition_is_waited_for(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds nothing up and is no fault; installed, its objects come, deleted, they go."""
    monkeypatch.setattr(reflector, "FIRST_DELAY", 0.4)  # as much longer than a look as in real life
    for kind, group in (("InferenceModel", MODEL_X.group), ("InferencePool", POOL.group)):
        api.store.uninstall(kind, group)
    with capture_logs() as logs:
        async with following(kubeconfig) as follower:
            await follower.until(has())
            api.store.install(POOL)
            pool = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": {"name": "p"}}
            spec = {"selector": {"matchLabels": {"app": "x"}}, "targetPorts": [{"number": 8000}]}
            api.store.put(pool | {"spec": spec})
            await follower.until(lambda config: bool(config.pools))
            assert follower.value("objects", resource=POOLS) == 1
            api.store.uninstall("InferencePool", POOL.group)
            await follower.until(lambda config: not config.pools)
            await asked(api, "discover /apis", api.requests.count("discover /apis") + 3)
    missing = [entry["resource"] for entry in logs if entry["event"] == "resource missing"]
    name = "InferencePool.inference.networking.k8s.io"
    assert missing == [name, "InferenceModel.inference.networking.x-k8s.io", POOLS]
    assert [entry for entry in logs if entry["event"] == "watch failed"] == []


async def test_a_resource_that_is_not_where_it_was_is_looked_for_at_once(
    api: FakeApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 404 does not wait for the next look, and one look is all it costs."""
    monkeypatch.setattr(kube, "LOOK", 60.0)
    with capture_logs() as logs:
        async with following(kubeconfig) as follower:
            await follower.until(has())
            assert api.requests.count("discover /apis") == 1
            api.store.uninstall("InferenceModel")
            await eventually(lambda: "resource missing" in _events(logs))
            assert api.requests.count("discover /apis") == 2


async def test_objects_go_only_when_their_absence_is_certain(api: FakeApiServer, kubeconfig: Path) -> None:
    """A resource that discovery loses for a moment, without events, keeps its objects; for long, it does not."""
    api.store.put(pod("a"))
    async with following(kubeconfig) as follower:
        await follower.until(has("a"))
        table = api.store.tables.pop(("", "pods"))
        api.drop()
        looks = api.requests.count("discover /apis")
        await asked(api, "discover /apis", looks + 2)
        api.store.tables["", "pods"] = table
        api.store.put(pod("b"))
        await follower.until(has("a", "b"))
        assert follower.value("objects", resource="pods") == 2
        del api.store.tables["", "pods"]
        api.drop()
        await follower.until(has())


async def test_a_starting_server_is_not_believed(api: FakeApiServer, kubeconfig: Path) -> None:
    """Before it says it is ready it may not know its own definitions: nothing counts as missing until then."""
    table = api.store.tables.pop((POOL.group, POOL.plural))
    await api.restart(initializing=True)
    async with following(kubeconfig) as follower:
        await eventually(lambda: follower.failures("HTTP", "discovery") >= 3)
        api.store.tables[POOL.group, POOL.plural] = table
        api.initialized()
        await follower.until(has())
        assert follower.lists("Start", POOLS) == 1


# --- faults ---


async def _drop(api: FakeApiServer) -> None:
    api.drop()


async def _restart(api: FakeApiServer) -> None:
    await api.restart()


async def _restart_slowly(api: FakeApiServer) -> None:
    await api.restart(initializing=True)
    asyncio.get_running_loop().call_later(0.3, api.initialized)


async def _away(api: FakeApiServer) -> None:
    await api.stop()
    asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(api.start()))


async def _hang(api: FakeApiServer) -> None:
    """For longer than a watch may take, so that it is noticed; then the server's process is killed."""
    api.hang()
    await asyncio.sleep(1.6)
    api.drop()
    api.resume()


async def _cut(api: FakeApiServer) -> None:
    api.faults.cut = True
    api.store.put(pod("a", "10.9.9.9"))
    await asyncio.sleep(0.05)
    api.faults.cut = False


async def _expire(api: FakeApiServer) -> None:
    api.store.forget()
    api.drop()


async def _pieces(api: FakeApiServer) -> None:
    api.faults.pieces = 7
    api.drop()


async def _slow(api: FakeApiServer) -> None:
    api.faults.delay = 0.02
    api.drop()


async def _rewind(api: FakeApiServer) -> None:
    api.rewind(5)
    api.drop()


def _errors(error: ApiError, verb: str) -> Any:
    async def fault(api: FakeApiServer) -> None:
        api.fail(error, verb, times=15)
        await api.restart()

    return fault


FAULTS = {
    "connections dropped": _drop,
    "restart, 410 for every watch": _restart,
    "restart, 429 while initializing": _restart_slowly,
    "away": _away,
    "hung": _hang,
    "a line cut in its middle": _cut,
    "watches expired": _expire,
    "lines in pieces": _pieces,
    "slow": _slow,
    "restored from a backup": _rewind,
    "watches refused, 429": _errors(ApiError(429, "TooManyRequests", "later", retry_after=0), "watch"),
    "watches refused, 500": _errors(ApiError(500, "InternalError", "boom"), "watch"),
    "lists refused, 504": _errors(too_large(99, 1), "list"),
    "lists refused, 500": _errors(ApiError(500, "InternalError", "boom"), "list"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_after_any_fault_it_is_what_the_server_has(fault: Any, api: FakeApiServer, kubeconfig: Path) -> None:
    """Nothing is dropped meanwhile; what came, changed and went during the fault, unseen, is seen after it."""
    for name in ("stays", "a", "goes"):
        api.store.put(pod(name))
    api.store.put(pod("rewound"))
    async with following(kubeconfig) as follower:
        await follower.until(has("a", "goes", "rewound", "stays"))
        await eventually(lambda: any(watch.table.resource.kind == "Pod" for watch in api.watches))
        lost: list[str] = []

        async def look() -> None:
            while True:
                config = await follower.until(lambda _: True)
                lost.extend({"stays", "a"} - set(pods(config)))
                await asyncio.sleep(0.01)

        looking = asyncio.ensure_future(look())
        await fault(api)
        api.store.put(pod("comes"))
        api.store.put(pod("a", "10.0.0.2"))
        delete(api, "Pod", "goes")
        config = await follower.until(has("a", "comes", "rewound", "stays"))
        config = await follower.until(lambda config: {p.meta.ref.name: p.ip for p in config.pods}["a"] == "10.0.0.2")
        api.store.put(pod("after"))
        config = await follower.until(has("a", "after", "comes", "rewound", "stays"))
        looking.cancel()
        assert lost == []
        assert config.rejections == ()


async def test_outage_is_told_once(api: FakeApiServer, kubeconfig: Path) -> None:
    """One line when it begins, one when it ends, for all resources together; staleness grows meanwhile."""
    with capture_logs() as logs:
        async with following(kubeconfig) as follower:
            await follower.until(has())
            await api.stop()
            await eventually(lambda: follower.failures("Unreachable") >= 5)
            before = follower.value("staleness_seconds", resource="pods")
            api.store.put(pod("a"))
            await api.start()
            await follower.until(has("a"))
            assert follower.value("staleness_seconds", resource="pods") < before
            await eventually(lambda: "watch recovered" in _events(logs))
    told = [entry for entry in logs if entry["event"].startswith("watch ") and entry["log_level"] != "debug"]
    assert [(entry["event"], entry["log_level"]) for entry in told] == [
        ("watch failed", "warning"),
        ("watch recovered", "info"),
    ]
    assert told[0]["message"] == f"cannot connect to 127.0.0.1:{api.port}: Connection refused"


async def test_forbidden_is_told_once_and_stops_no_other(api: FakeApiServer, kubeconfig: Path) -> None:
    """With the verb, the resource and the user; the others go on, its last good state stays; granted, it goes on."""
    api.store.put(pod("a"))
    with capture_logs() as logs:
        async with following(kubeconfig) as follower:
            await follower.until(has("a"))
            api.forbidden |= {("list", "pods"), ("watch", "pods")}
            await api.restart()
            delete(api, "Pod", "a")
            service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}
            api.store.put(service | {"spec": {"ports": [{"port": 80}]}})
            config = await follower.until(lambda config: bool(config.services))
            await eventually(lambda: follower.failures("Forbidden") >= 3)
            assert pods(config) == ["a"]
            api.forbidden.clear()
            await follower.until(has())
    (told,) = [entry for entry in logs if entry["event"] == "watch failed" and entry["reason"] == "Forbidden"]
    assert (told["resource"], told["log_level"]) == ("pods", "warning")
    assert 'cannot watch resource "pods" in API group "" at the cluster scope' in told["message"]
    assert "RBAC" in told["message"]


async def test_forbidden_at_the_start(api: FakeApiServer, kubeconfig: Path) -> None:
    """A resource of ours holds up the first Config; one of another product's does not."""
    api.forbidden |= {("list", "pods"), ("list", POLICY.plural)}
    async with following(kubeconfig) as follower:
        await eventually(lambda: follower.failures("Forbidden") >= 4 and follower.lists("Start", "services") > 0)
        assert follower.config is None
        api.forbidden.remove(("list", "pods"))
        await follower.until(has())
        assert follower.value("staleness_seconds", resource=f"{POLICY.plural}.{POLICY.group}") > 0


async def test_a_new_token_is_taken(api: FakeApiServer, tmp_path: Path) -> None:
    """The kubeconfig names a file: after a 401 it is read again; until it is right, the last good state stays."""
    token, kubeconfig = tmp_path / "token", tmp_path / "kubeconfig"
    token.write_text(api.token)
    config = yaml.safe_load(api.kubeconfig())
    config["users"][0]["user"] = {"tokenFile": str(token)}
    kubeconfig.write_text(yaml.safe_dump(config))
    api.store.put(pod("a"))
    with capture_logs() as logs:
        async with following(kubeconfig) as follower:
            await follower.until(has("a"))
            api.token = "another"
            await api.restart()
            api.store.put(pod("b"))
            await eventually(lambda: follower.failures("Unauthorized") >= 2)
            assert follower.config is not None
            assert pods(follower.config) == ["a"]
            token.write_text("another")
            await follower.until(has("a", "b"))
    assert [e["log_level"] for e in logs if e["event"] == "watch failed"][:1] == ["warning"]


def _events(logs: list[MutableMapping[str, Any]]) -> list[str]:
    return [entry["event"] for entry in logs if entry["log_level"] != "debug"]
