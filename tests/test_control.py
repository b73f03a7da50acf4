"""The flow from objects and readings to the management server, with the server's place taken by a recorder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from tests.objects import backend, config, exact, gateway, gateway_class, parent, pod, pool, ref, route, rule, service
from tests.test_translate import weights_of
from xds import snapshot as types
from xds.control import Control
from xds.envoy import Options
from xds.metrics import Metrics
from xds.model import Config, Level, Load, Object, ObjectRef, Pod, Rejection, Status
from xds.scrape import Reading, Scraper
from xds.server import ManagementServer
from xds.snapshot import Snapshot
from xds.translate import translate
from xds.weights import BASE
from xds.wire import discovery_pb2 as wire
from xds.wire import load_pb2 as pb

POOL = "pool/default/llm"
A, B, C = (pod(name, f"10.0.0.{i}") for i, name in enumerate("abc", 1))
METRICS = {each.meta.ref.name: f"http://{each.ip}:8000/metrics" for each in (A, B, C)}
REJECTION = Rejection(ObjectRef("", "Service", "default", "x"), "Invalid", "expected y", "spec.z", "f.yaml:3")


class Recorder:
    """A management server without clients: what was published, in order."""

    def __init__(self) -> None:
        self.published: list[Snapshot] = []

    def publish(self, snapshot: Snapshot) -> None:
        self.published.append(snapshot)

    def follow_answers(self, tell: Callable[[str, Mapping[str, str], str], None]) -> None:
        self.tell = tell

    @property
    def last(self) -> Snapshot:
        return self.published[-1]


class World:
    """A control loop whose clock the test holds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.recorder = Recorder()
        self.metrics = Metrics()
        self.scraper = Scraper(self.metrics, 2.0)
        self.control = Control(
            cast("ManagementServer", self.recorder),
            self.scraper,
            self.metrics,
            interval=2.0,
            options=Options(),
            clock=lambda: self.now,
        )

    async def follow(self, rounds: int = 1, **loads: Load) -> None:
        """Rounds of 2 s in which the pages of these pods, by name, are read."""
        for _ in range(rounds):
            self.now += 2.0
            await self.control.follow({METRICS[name]: Reading(load, self.now) for name, load in loads.items()})

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as captured:
        yield captured


Logs = list[MutableMapping[str, Any]]


def objects(*pods: Pod, extra: tuple[Object, ...] = ()) -> Config:
    llm = backend("llm", "InferencePool", port=0)
    return config(gateway_class(), gateway(), route(rule(llm)), pool(), *pods, *extra)


def events(logs: Logs, *names: str) -> list[str]:
    return [entry["event"] for entry in logs if not names or entry["event"] in names]


def pool_loads(snapshot: Snapshot) -> dict[str, pb.PoolLoad]:
    resources = snapshot.resources[types.POOL_LOAD]
    return {name: pb.PoolLoad.FromString(wire.Any.FromString(each.any).value) for name, each in resources.items()}


QUEUED = Load(running=20, waiting=60, kv_usage=0.5, kv_tokens=1000)
IDLE = Load(running=20, waiting=0, kv_usage=0.5, kv_tokens=1000)


# --- what Envoys report ---


async def test_loads_follow_what_is_in_flight(world: World) -> None:
    """Between two rounds of weights the loads are sent again with what Envoys have under way; nothing else changes."""
    await world.control.configure(objects(A, B))
    await world.follow(1, a=IDLE, b=IDLE)
    before = world.recorder.last
    world.control.in_flight.report("envoy", {POOL: {f"{A.ip}:8000": 40}}, world.now)
    world.now += 0.5
    await world.control.refresh_loads()
    (load,) = pool_loads(world.recorder.last).values()
    assert load.in_flight.age == pytest.approx(0.5)
    assert {each.hash_key: (each.in_flight, each.running) for each in load.endpoints} == {
        "default/a": (40, 20),
        "default/b": (0, 20),
    }
    assert world.value("vllm_xds_endpoint_in_flight", pool=POOL, endpoint="default/a") == 40
    assert {t for t in types.TYPES if world.recorder.last.versions[t] != before.versions[t]} == {types.POOL_LOAD}


async def test_before_a_configuration_there_is_nothing_to_refresh(world: World) -> None:
    """Reports that come first change nothing."""
    await world.control.refresh_loads()
    assert world.recorder.published == []


# --- what Envoys refuse ---


async def test_a_refused_route_is_taken_back_and_named(world: World, logs: Logs) -> None:
    """An Envoy refuses the routes of a port for the one that has changed: the log, the metrics and the rejections name
    it, everybody is served its last accepted version, and the rest follows further changes. Mended, it is served."""

    def made(path: str, other: str = "/other") -> Config:
        objects = (gateway_class(), gateway(), service(), A)
        return config(*objects, *(route(rule(matches=[exact(p)]), name=p[1:].split("-")[0]) for p in (path, other)))

    def answer(verdict: str) -> None:
        world.recorder.tell(types.ROUTE, {"http-8080": routes().version}, verdict)

    def routes() -> types.Resource:
        return world.recorder.last.resources[types.ROUTE]["http-8080"]

    await world.control.configure(made("/a"))
    answer("")
    good = routes().version
    await world.control.configure(made("/a-bad"))
    answer("no such path")
    logs.clear()
    await world.control.review()
    assert routes().version == good
    (line,) = [line for line in logs if line["event"] == "object rejected"]
    assert (line["object"], line["reason"], line["log_level"]) == ("HTTPRoute default/a", "RefusedByEnvoy", "error")
    assert "no such path" in line["message"]
    assert world.value("vllm_xds_objects_refused", object="HTTPRoute default/a") == 1
    assert world.value("vllm_xds_rejections", level="error", reason="RefusedByEnvoy") == 1

    logs.clear()
    await world.control.configure(made("/a-bad", "/other-2"))
    assert routes().version not in (good, "")
    answer("")
    await world.control.review()
    assert "object rejected" not in events(logs)
    assert "rejection cleared" not in events(logs)

    await world.control.configure(made("/a-3", "/other-2"))
    assert "rejection cleared" in events(logs)
    assert world.value("vllm_xds_objects_refused", object="HTTPRoute default/a") is None
    assert world.control.rejections == ()


async def test_what_envoy_refuses_is_in_the_statuses(world: World) -> None:
    """The HTTPRoute at its new generation, with what Envoy said; a Gateway whose listener is refused, a pool whose
    cluster is. A trial is not told of, and what is mended is well again."""
    told: list[dict[ObjectRef, Status]] = []
    world.control.follow_statuses(lambda statuses, _: told.append({status.ref: status for status in statuses}))

    def made(path: str, generation: int) -> Config:
        llm = rule(backend("llm", "InferencePool", port=0), matches=[exact(path)])
        about = route(llm)
        changed = replace(about, meta=replace(about.meta, generation=generation))
        return config(gateway_class(), gateway(), pool(), A, changed)

    def said(of: ObjectRef) -> list[tuple[str, str, str, int]]:
        status = told[-1][of]
        conditions = [*status.conditions, *(each for parent in status.parents for each in parent.conditions)]
        return [(each.type, each.status, each.reason, each.generation) for each in conditions]

    def answer(type_url: str, name: str, verdict: str) -> None:
        resources = world.recorder.last.resources[type_url]
        world.recorder.tell(type_url, {name: resources[name].version}, verdict)

    of_route, of_gateway, of_pool = ref("HTTPRoute", "route"), ref("Gateway", "gw"), ref("InferencePool", "llm")
    accepted, resolved = ("Accepted", "True", "Accepted"), ("ResolvedRefs", "True", "ResolvedRefs")
    await world.control.configure(made("/a", 1))
    assert said(of_route) == [(*accepted, 1), (*resolved, 1)]
    answer(types.ROUTE, "http-8080", "")
    await world.control.configure(made("/bad", 2))
    answer(types.ROUTE, "http-8080", "no such path")
    await world.control.review()
    assert said(of_route) == [("Accepted", "False", "RefusedByEnvoy", 2)]
    assert "no such path" in told[-1][of_route].parents[0].conditions[0].message
    assert said(of_pool)[0] == ("Accepted", "False", "HTTPRouteNotAccepted", 0)

    await world.control.configure(made("/b", 3))
    assert said(of_route) == [(*accepted, 3), (*resolved, 3)]
    assert said(of_gateway) == [(*accepted, 0), ("Programmed", "True", "Programmed", 0)]
    answer(types.LISTENER, "http-8080", "no such filter")
    answer(types.CLUSTER, POOL, "no such policy")
    count = len(told)
    await world.control.review()
    assert len(told) == count + 1
    assert said(of_gateway) == [(*accepted, 0), ("Programmed", "False", "Invalid", 0)]
    assert said(of_pool) == [("Accepted", "False", "RefusedByEnvoy", 0), (*resolved, 0)]
    answer(types.LISTENER, "http-8080", "")
    answer(types.CLUSTER, POOL, "")
    await world.control.review()
    assert said(of_gateway) == [(*accepted, 0), ("Programmed", "True", "Programmed", 0)]
    assert said(of_pool) == [(*accepted, 0), (*resolved, 0)]


async def test_a_refused_cluster_falls_back(world: World, logs: Logs) -> None:
    """The cluster as it was accepted is what Envoys that come later get, and new weights do not change that."""

    def cluster() -> str:
        return world.recorder.last.resources[types.CLUSTER][POOL].version

    await world.control.configure(objects(A, B))
    good = cluster()
    world.recorder.tell(types.CLUSTER, {POOL: good}, "")
    await world.control.configure(
        config(gateway_class(), gateway(), route(rule(backend("llm", "InferencePool", port=0))), pool(http2=True), A, B)
    )
    assert cluster() != good
    world.recorder.tell(types.CLUSTER, {POOL: cluster()}, "no h2")
    await world.control.review()
    assert cluster() == good
    published = len(world.recorder.published)
    await world.control.review()
    assert len(world.recorder.published) == published
    await world.follow(2, a=QUEUED, b=IDLE)
    assert cluster() == good
    (line,) = [line for line in logs if line["event"] == "object rejected"]
    assert line["object"] == "InferencePool default/llm"


# --- configure ---


async def test_a_configuration_is_published(world: World, logs: Logs) -> None:
    """Objects in, one snapshot out, and one line that says what is served; endpoints are not logged one by one."""
    await world.control.configure(objects(A, B))
    assert len(world.recorder.published) == 1
    assert weights_of(world.recorder.last) == [BASE, BASE]
    assert world.control.snapshot is world.recorder.last
    (line,) = logs
    assert line["event"] == "configuration applied"
    assert (line["ports"], line["routes"], line["clusters"], line["rejections"]) == ([8080], 1, {POOL: 2}, 0)


async def test_endpoints_that_come_drain_and_go_are_logged_once(world: World, logs: Logs) -> None:
    """An operator sees a rollout pod by pod, and nothing when nothing changed."""
    await world.control.configure(objects(A, B))
    await world.control.configure(objects(replace(A, deleting=True), B, C))
    await world.control.configure(objects(replace(B, ip="10.0.0.9"), C))
    await world.control.configure(objects(replace(B, ip="10.0.0.9"), C))
    names = ("endpoint added", "endpoint draining", "endpoint removed", "endpoint changed")
    seen = [(e["event"], e["endpoint"], e["address"], e["cluster"]) for e in logs if e["event"] in names]
    assert seen == [
        ("endpoint draining", "default/a", "10.0.0.1:8000", POOL),
        ("endpoint added", "default/c", "10.0.0.3:8000", POOL),
        ("endpoint removed", "default/a", "10.0.0.1:8000", POOL),
        ("endpoint changed", "default/b", "10.0.0.9:8000", POOL),
    ]


async def test_a_rejection_is_logged_when_it_comes_and_when_it_goes(world: World, logs: Logs) -> None:
    """Once each, however often the rest changes, with what an author needs to find it."""
    broken = replace(objects(A), rejections=(REJECTION, REJECTION))
    for each in (broken, replace(objects(A, B), rejections=(REJECTION,)), objects(A), objects(A, B)):
        await world.control.configure(each)
    seen = [e for e in logs if e["event"] in ("object rejected", "rejection cleared")]
    about = {
        "object": "Service default/x",
        "field": "spec.z",
        "reason": "Invalid",
        "message": "expected y",
        "source": "f.yaml:3",
    }
    assert seen == [
        {"event": "object rejected", "log_level": "error", **about},
        {"event": "rejection cleared", "log_level": "info", **about},
    ]


async def test_warnings_are_warnings_and_empty_fields_are_left_out(world: World, logs: Logs) -> None:
    """A document whose object is not known has no `object`."""
    warning = Rejection(None, "UnknownKind", "not served", level=Level.WARNING)
    await world.control.configure(replace(objects(A), rejections=(warning,)))
    (seen,) = [e for e in logs if e["event"] == "object rejected"]
    assert seen == {
        "event": "object rejected",
        "log_level": "warning",
        "reason": "UnknownKind",
        "message": "not served",
    }
    assert [e["rejections"] for e in logs if e["event"] == "configuration applied"] == [0]


async def test_metrics_count_objects_and_current_rejections(world: World) -> None:
    """Gauges follow down as well as up; every reading is counted by its result."""
    missing = route(rule(backend("missing"), backend("missing", port=1)), name="z", parents=[parent()])
    await world.control.configure(replace(objects(A, B, extra=(missing,)), rejections=(REJECTION,)))
    assert world.value("vllm_xds_objects", kind="Pod") == 2
    assert world.value("vllm_xds_rejections", level="error", reason="Invalid") == 1
    assert world.value("vllm_xds_rejections", level="error", reason="BackendNotFound") == 1
    await world.control.configure(objects(A))
    assert world.value("vllm_xds_objects", kind="Pod") == 1
    assert world.value("vllm_xds_rejections", level="error", reason="Invalid") is None
    assert world.value("vllm_xds_config_loads_total", result="rejected") == 1
    assert world.value("vllm_xds_config_loads_total", result="ok") == 1
    assert world.value("vllm_xds_translate_seconds_count") == 2


async def test_an_inconsistent_snapshot_is_not_published(world: World, logs: Logs) -> None:
    """A defect of ours must not make Envoy answer 503: what is served stays, and an error names the hole."""
    await world.control.configure(objects(A))
    world.control._publish(translate(replace(world.control.topology, clusters=()), Options(), {}))
    assert world.recorder.published == [world.control.snapshot]
    (line,) = [e for e in logs if e["log_level"] == "error"]
    assert (line["event"], line["missing"]) == ("snapshot inconsistent", [f"http-8080 -> {POOL}"])


# --- follow ---


async def test_nothing_is_followed_before_the_first_configuration(world: World) -> None:
    """An answer before that would take a running Envoy's configuration away."""
    await world.control.follow({})
    assert world.recorder.published == []


async def test_a_queue_moves_weights_and_says_why(world: World, logs: Logs) -> None:
    """Readings that last change Envoy's endpoints, and one line has old, new, the reason and its inputs."""
    await world.control.configure(objects(A, B, C))
    await world.follow(10, a=QUEUED, b=IDLE, c=IDLE)
    weights = weights_of(world.recorder.last)
    assert weights[0] < BASE
    assert weights[1:] == [BASE, BASE]
    changes = [e for e in logs if e["event"] == "weight changed"]
    assert changes[-1]["new"] == weights[0]
    assert {e["endpoint"] for e in changes} == {"default/a"}
    assert [(e["pool"], e["reason"]) for e in changes] == [(POOL, "queue")] * len(changes)
    assert [e["old"] for e in changes] == [BASE, *(e["new"] for e in changes[:-1])]
    assert changes[-1]["running"] == 20
    assert 0 < changes[-1]["waiting"] <= 60


async def test_each_round_is_a_pool_load_and_no_new_endpoints(world: World) -> None:
    """The picker hears each round, Envoy nothing while no weight changes."""
    await world.control.configure(objects(A, B))
    before = world.recorder.last
    await world.follow(2, a=IDLE, b=IDLE)
    first, second = world.recorder.published[-2:]
    assert [pool_loads(each)[POOL].round for each in (first, second)] == [2, 3]
    assert first.versions[types.POOL_LOAD] != second.versions[types.POOL_LOAD]
    for type_url in (types.LISTENER, types.ROUTE, types.CLUSTER, types.ENDPOINT):
        assert second.resources[type_url] is before.resources[type_url]


async def test_a_pool_load_has_every_pods_reading(world: World) -> None:
    """A pod that was not read is there with a negative age; a failing one with the age of its last page."""
    await world.control.configure(objects(A, B))
    await world.follow(a=QUEUED)
    world.now += 1.0
    read_at = world.now - 1.0
    await world.control.follow({METRICS["a"]: Reading(QUEUED, read_at, failures=1, reason="Timeout")})
    a, b = pool_loads(world.recorder.last)[POOL].endpoints
    assert (a.hash_key, a.running, a.waiting, a.kv_tokens, a.age) == ("default/a", 20, 60, 1000, 1.0)
    assert (b.hash_key, b.running, b.age) == ("default/b", 0, -1.0)


async def test_a_change_of_objects_between_rounds_keeps_weights_and_loads(world: World) -> None:
    """A new route must not give a full pod its whole share back, nor make the picker forget."""
    await world.control.configure(objects(A, B, C))
    await world.follow(10, a=QUEUED, b=IDLE, c=IDLE)
    before = world.recorder.last
    await world.control.configure(objects(A, B, C, extra=(route(rule(backend()), name="more"), service())))
    after = world.recorder.last
    assert weights_of(after) == weights_of(before)
    assert weights_of(after)[0] < BASE
    assert after.versions[types.POOL_LOAD] == before.versions[types.POOL_LOAD]
    assert after.versions[types.ROUTE] != before.versions[types.ROUTE]


async def test_a_pool_that_goes_is_forgotten(world: World) -> None:
    """Its weights, its load and its series; when it comes back it starts anew."""
    await world.control.configure(objects(A, B, C))
    await world.follow(10, a=QUEUED, b=IDLE, c=IDLE)
    assert world.value("vllm_xds_endpoint_waiting", pool=POOL, endpoint="default/a") == 60
    await world.control.configure(config(gateway_class(), gateway()))
    assert pool_loads(world.recorder.last) == {}
    assert world.value("vllm_xds_endpoint_waiting", pool=POOL, endpoint="default/a") is None
    await world.follow()
    assert pool_loads(world.recorder.last) == {}
    await world.control.configure(objects(A, B, C))
    assert weights_of(world.recorder.last) == [BASE] * 3


async def test_a_service_is_neither_weighed_nor_scraped(world: World) -> None:
    """It is the plain baseline."""
    plain = config(gateway_class(), gateway(), route(rule()), service(), A, B)
    await world.control.configure(plain)
    await world.follow(10, a=QUEUED, b=IDLE)
    assert weights_of(world.recorder.last, "service/default/web/80") == [BASE, BASE]
    assert world.scraper._targets == {}
    assert pool_loads(world.recorder.last) == {}


async def test_series_of_each_endpoint(world: World) -> None:
    """Weight and age always, a load's gauges where a page was read; none outlives its endpoint."""
    await world.control.configure(objects(A, B))
    await world.follow(a=QUEUED)
    world.now += 3.0
    labels = {"pool": POOL, "endpoint": "default/a"}
    assert world.value("vllm_xds_endpoint_weight", **labels) == BASE
    assert world.value("vllm_xds_endpoint_load_age_seconds", **labels) == 3.0
    assert world.value("vllm_xds_endpoint_running", **labels) == 20
    assert world.value("vllm_xds_endpoint_kv_usage", **labels) == 0.5
    unread = {"pool": POOL, "endpoint": "default/b"}
    assert world.value("vllm_xds_endpoint_weight", **unread) == BASE
    assert world.value("vllm_xds_endpoint_running", **unread) is None
    await world.control.configure(objects(B))
    await world.follow(b=IDLE)
    assert world.value("vllm_xds_endpoint_weight", **labels) is None


# --- run ---


async def test_run_serves_each_configuration_of_the_source(world: World) -> None:
    """The first at once, the next when they come; it ends with its task, and leaves nothing behind."""
    queue: asyncio.Queue[Config] = asyncio.Queue()

    async def source() -> AsyncIterator[Config]:
        while True:
            yield await queue.get()

    def pods(count: int) -> Callable[[Control], bool]:
        return lambda control: sum(len(cluster.endpoints) for cluster in control.topology.clusters) == count

    task = asyncio.create_task(world.control.run(source()))
    async with asyncio.timeout(20):
        for given in ((A,), (A, B)):
            queue.put_nowait(objects(*given))
            await world.control.wait_until(pods(len(given)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(asyncio.all_tasks()) == 1


async def test_a_pod_that_joins_warm_ones_begins_at_its_ramp(world: World, logs: Logs) -> None:
    """Its first endpoints carry the low weight, and the first pool load names it: neither waits for a round."""
    await world.control.configure(objects(A, B))
    await world.follow(40, a=IDLE, b=IDLE)
    await world.control.configure(objects(A, B, C))
    a, b, c = weights_of(world.recorder.last)
    assert (a, b) == (BASE, BASE)
    assert c < BASE
    assert [e.hash_key for e in pool_loads(world.recorder.last)[POOL].endpoints][-1] == "default/c"
    (line,) = [entry for entry in logs if entry["event"] == "weight changed"]
    assert (line["endpoint"], line["old"], line["new"], line["reason"]) == ("default/c", 0, c, "ramp")


async def test_an_empty_start_is_waited_out(world: World, logs: Logs) -> None:
    """A missing mount must not wipe running Envoys; once something was served, an empty configuration is meant."""
    await world.control.configure(config())
    assert world.recorder.published == []
    assert world.control.snapshot is None
    assert events(logs) == ["configuration empty"]
    await world.follow()
    assert world.recorder.published == []
    await world.control.configure(objects(A))
    await world.control.configure(config())
    assert [bool(each.resources[types.LISTENER]) for each in world.recorder.published] == [True, False]
