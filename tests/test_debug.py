"""/debug/snapshot and /debug/clients over HTTP, of a control loop with a real management server and real clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from tests.ads_client import AdsClient, DeltaPeer, SotwPeer
from tests.objects import backend, config, gateway, gateway_class, pod, pool, route, rule
from xds import debug
from xds.control import Control
from xds.envoy import Options
from xds.metrics import Metrics
from xds.model import Config, Level, Load, ObjectRef, Rejection
from xds.scrape import Reading, Scraper
from xds.server import ManagementServer
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, POOL_CONFIG, POOL_LOAD, ROUTE, TYPES, label
from xds.status import serve_status
from xds.weights import Pool

POOL = "pool/default/llm"
A, B, C = (pod(name, f"10.0.0.{i}") for i, name in enumerate("abc", 1))
LOAD = Load(running=12, waiting=3, kv_usage=0.426, kv_tokens=1000)
REJECTION = Rejection(ObjectRef("", "Service", "default", "x"), "Invalid", "expected y", "spec.z", "f.yaml:3")
WARNING = Rejection(None, "UnknownKind", "not served", level=Level.WARNING)


class Running:
    """A server as `serve` puts it together, its clock and its readings held by the test."""

    def __init__(self) -> None:
        self.now = 1000.0
        metrics = Metrics()
        self.server = ManagementServer(metrics)
        self.control = Control(
            self.server,
            Scraper(metrics, 2.0),
            metrics,
            interval=2.0,
            options=Options(),
            clock=lambda: self.now,
        )
        self.metrics = metrics
        self.stack = AsyncExitStack()
        self.address = ""  # of ADS
        self.status = ""

    async def client(self, peer: SotwPeer | DeltaPeer, *types: str) -> AdsClient:
        """A client that has accepted all there is of these types."""
        client = await self.stack.enter_async_context(AdsClient(self.address, peer))
        for type_url in types:
            await client.send(client.peer.subscribe(type_url))
            await client.send(client.peer.ack(await client.receive()))
        async with asyncio.timeout(10):
            await self.server.wait_settled()
        return client

    async def get(self, path: str) -> Any:
        """The page, or its HTTP status when that is not 200."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.status}{path}") as response:
            return await response.json() if response.status == 200 else response.status


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    it = Running()
    async with it.stack:
        (port,) = await it.server.start(["127.0.0.1:0"])
        it.stack.push_async_callback(it.server.stop, 0.1)
        it.address = f"127.0.0.1:{port}"
        ready, pages = lambda: it.control.snapshot is not None, debug.pages(it.control)
        status = serve_status("127.0.0.1", 0, it.metrics.registry, ready, pages)
        it.status = f"127.0.0.1:{await it.stack.enter_async_context(status)}"
        yield it


def objects(*rejections: Rejection, paths: int = 1) -> Config:
    """One pool of a (read later), b (never read) and c (draining) behind one port, with `paths` rules."""
    rules = [rule(backend("llm", "InferencePool", port=0))] * paths
    made = config(gateway_class(), gateway(), route(*rules), pool(), A, B, replace(C, deleting=True))
    return replace(made, rejections=rejections)


async def test_nothing_before_the_first_configuration(running: Running) -> None:
    """The page is there, and says that nothing is served."""
    empty: dict[str, Any] = {"ready": False, "ports": [], "types": {}, "pools": [], "rejections": []}
    assert await running.get("/debug/snapshot") == empty
    assert await running.get("/debug/snapshot?type=Cluster&name=x") == 404
    assert await running.get("/debug/clients") == {"clients": []}


async def test_the_snapshot(running: Running) -> None:
    """Each type's version and resources, each pool's endpoints with weight and last load, and each rejection."""
    await running.control.configure(objects(REJECTION, WARNING))
    running.now += 2.0
    readings = {f"http://{A.ip}:8000/metrics": Reading(LOAD, running.now)}
    await running.control.follow(readings)
    running.now += 1.5
    page = await running.get("/debug/snapshot")

    snapshot = running.control.snapshot
    assert snapshot is not None
    assert page["ready"] is True
    assert page["ports"] == [{"port": 8080, "group": "", "routes": 1}]
    assert list(page["types"]) == [label(type_url) for type_url in TYPES]
    for type_url in TYPES:
        assert page["types"][label(type_url)] == {
            "version": snapshot.versions[type_url],
            "resources": [
                {"name": name, "version": each.version, "bytes": len(each.any)}
                for name, each in snapshot.resources[type_url].items()
            ],
        }
    unread = {"age": None, "running": None, "waiting": None, "kv_usage": None, "in_flight": None}
    read = {"age": 1.5, "running": 12, "waiting": 3, "kv_usage": 0.426, "in_flight": None}
    (about,) = page["pools"]
    assert (about["name"], about["strategy"]) == (POOL, "DEFAULT")
    assert about["endpoints"] == [
        {"endpoint": "default/a", "address": "10.0.0.1:8000", "draining": False, "weight": 100, **read},
        {"endpoint": "default/b", "address": "10.0.0.2:8000", "draining": False, "weight": 100, **unread},
        {"endpoint": "default/c", "address": "10.0.0.3:8000", "draining": True, "weight": 100, **unread},
    ]
    assert page["rejections"] == [
        {
            "object": "Service default/x",
            "field": "spec.z",
            "reason": "Invalid",
            "message": "expected y",
            "source": "f.yaml:3",
            "level": "error",
        },
        {"object": "", "field": "", "reason": "UnknownKind", "message": "not served", "source": "", "level": "warning"},
    ]


async def test_the_weight_is_the_one_envoy_has(running: Running) -> None:
    """A pod whose queue is long has a lower one, here as in the endpoints that are served."""
    await running.control.configure(objects())
    for _ in range(10):
        running.now += 2.0
        loads = {A.ip: replace(LOAD, waiting=80), B.ip: replace(LOAD, waiting=0)}
        readings = {f"http://{ip}:8000/metrics": Reading(load, running.now) for ip, load in loads.items()}
        await running.control.follow(readings)
    (about,) = (await running.get("/debug/snapshot"))["pools"]
    weights = {each["endpoint"]: each["weight"] for each in about["endpoints"]}
    served = (await running.get(f"/debug/snapshot?type=ClusterLoadAssignment&name={POOL}"))["resource"]
    assert weights["default/a"] < 100
    assert weights == {
        each["metadata"]["filterMetadata"]["envoy.lb"]["hash_key"]: each["loadBalancingWeight"]
        for each in served["endpoints"][0]["lbEndpoints"]
    }


async def test_a_pool_that_is_ahead_of_its_topology(running: Running) -> None:
    """Between the two steps of a new configuration an endpoint may be gone from one and not from the other."""
    await running.control.configure(objects())
    running.control.pools = {POOL: Pool(POOL)}
    (about,) = (await running.get("/debug/snapshot"))["pools"]
    assert [(each["weight"], each["age"]) for each in about["endpoints"]] == [(100, None)] * 3


@pytest.mark.parametrize(
    ("type_url", "name", "key", "value"),
    [
        (CLUSTER, POOL, "type", "EDS"),
        (ENDPOINT, POOL, "clusterName", POOL),
        (LISTENER, "http-8080", "address", {"socketAddress": {"address": "0.0.0.0", "portValue": 8080}}),
        (ROUTE, "http-8080", "name", "http-8080"),
        (POOL_CONFIG, POOL, "costs", {}),
        (POOL_LOAD, POOL, "round", "1"),
    ],
    ids=lambda value: label(value) if value in TYPES else None,
)
async def test_one_resource_decoded(running: Running, type_url: str, name: str, key: str, value: object) -> None:
    """Of every type, as the JSON Envoy's own /config_dump has; another type's name or none at all is a 404."""
    await running.control.configure(objects())
    page = await running.get(f"/debug/snapshot?type={label(type_url)}&name={name}")
    assert running.control.snapshot is not None
    resource = running.control.snapshot.resources[type_url][name]
    assert (page["name"], page["version"], page["bytes"]) == (name, resource.version, len(resource.any))
    assert page["resource"]["@type"] == type_url
    assert page["resource"][key] == value
    assert await running.get(f"/debug/snapshot?type={label(type_url)}") == 404
    assert await running.get(f"/debug/snapshot?type=other&name={name}") == 404
    assert await running.get(f"/debug/snapshot?name={name}") == 404


@pytest.mark.parametrize("peer", [SotwPeer, DeltaPeer])
async def test_clients(running: Running, peer: Any) -> None:
    """Node, variant and peer of each stream, and of each type it asked for what was sent and accepted."""
    await running.control.configure(objects())
    client = await running.client(peer("envoy-1"), CLUSTER, LISTENER)
    await client.send(client.peer.subscribe(ROUTE, "http-8080", "none"))
    await client.send(client.peer.ack(await client.receive()))
    await running.client(peer("envoy-0"), CLUSTER)
    other, first = (await running.get("/debug/clients"))["clients"]
    assert (other["node_id"], [each["type"] for each in other["types"]]) == ("envoy-0", ["Cluster"])
    assert first.pop("peer").startswith("ipv4:127.0.0.1:")
    types = {each.pop("type"): each for each in first.pop("types")}
    assert first == {
        "node_id": "envoy-1",
        "node_cluster": "test",
        "group": "",
        "variant": peer.variant,
        "settled": True,
    }
    assert running.control.snapshot is not None
    versions = running.control.snapshot.versions
    assert types == {
        label(type_url): {
            "wildcard": wildcard,
            "names": names,
            "version_sent": versions[type_url],
            "version_acked": versions[type_url],
            "refused": [],
            "last_nack": "",
        }
        for type_url, wildcard, names in ((CLUSTER, True, 0), (LISTENER, True, 0), (ROUTE, False, 2))
    }


async def test_a_stream_without_a_request(running: Running) -> None:
    """It is shown, and not as one that has all it wants."""
    await running.control.configure(objects())
    async with AdsClient(running.address, DeltaPeer()), asyncio.timeout(10):
        while not running.server.clients():
            await running.server._progress.wait()
        (view,) = (await running.get("/debug/clients"))["clients"]
    assert (view["node_id"], view["settled"], view["types"]) == ("", False, [])


@pytest.mark.parametrize("peer", [SotwPeer, DeltaPeer])
async def test_a_client_that_is_behind_and_one_that_refuses(running: Running, peer: Any) -> None:
    """Sent and not yet accepted; then the refused resource with the client's words; then accepted anew."""
    await running.control.configure(objects())
    client = await running.client(peer(), CLUSTER, LISTENER)
    await client.send(client.peer.subscribe(ROUTE, "http-8080"))
    await client.send(client.peer.ack(await client.receive()))

    async def routes() -> tuple[bool, dict[str, Any]]:
        (view,) = (await running.get("/debug/clients"))["clients"]
        return view["settled"], view["types"][-1]

    await running.control.configure(objects(paths=2))
    response = await client.receive()
    settled, view = await routes()
    assert not settled
    assert view["version_sent"] != view["version_acked"]
    await client.send(client.peer.nack(response, "no such route"))
    async with asyncio.timeout(10):
        await running.server.wait_settled()
    settled, view = await routes()
    assert settled
    assert (view["refused"], view["last_nack"]) == (["http-8080"], "no such route")
    await running.control.configure(objects(paths=3))
    await client.send(client.peer.ack(await client.receive()))
    async with asyncio.timeout(10):
        await running.server.wait_settled()
    settled, view = await routes()
    assert settled
    assert (view["refused"], view["last_nack"]) == ([], "no such route")
    assert view["version_sent"] == view["version_acked"]
