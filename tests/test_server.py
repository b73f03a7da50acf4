"""The gRPC shell: the scenarios over the wire, and what only a server has: many clients, bad ones, start and stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import structlog

from tests.ads_client import ADS, OF_TYPE, AdsClient, DeltaPeer, SotwPeer, resource
from tests.scenarios import FULL, OF_ONE_TYPE, PEERS, SCENARIOS, Link, snapshot
from xds.metrics import Metrics
from xds.server import HEALTH, NOT_SERVING, SERVING, ManagementServer
from xds.snapshot import CLUSTER, ENDPOINT, LISTENER, POOL_LOAD, Snapshot
from xds.stream import MAX_NAMES

PATIENCE = 10  # seconds: nothing here takes one


class Served:
    """A management server on a free port of loopback, and its metrics."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.server = ManagementServer(self.metrics, linger=0)
        self.address = ""

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(s.value for metric in self.metrics.registry.collect() for s in metric.samples if s.name == name)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    it = Served()
    (port,) = await it.server.start(["127.0.0.1:0"])
    it.address = f"127.0.0.1:{port}"
    yield it
    await it.server.stop(grace=0.1)


@pytest.fixture
async def connect(served: Served) -> AsyncIterator[Callable[..., Any]]:
    """Open clients that are closed after the test."""
    async with AsyncExitStack() as stack:

        async def connect(peer: SotwPeer | DeltaPeer, service: str = ADS) -> AdsClient:
            return await stack.enter_async_context(AdsClient(served.address, peer, service=service))

        yield connect


class WireLink(Link):
    """A scenario's client over gRPC."""

    def __init__(self, served: Served, client: AdsClient) -> None:
        self.peer = client.peer
        self._served = served
        self._client = client
        self._published = False
        self._fences = 0

    async def publish(self, snapshot: Snapshot) -> None:
        self._served.server.publish(snapshot)
        self._published = True

    async def send(self, *requests: Any) -> None:
        await self._client.send(*requests)

    async def receive(self) -> Any:
        return await self._client.receive()

    async def quiet(self) -> None:
        """Ask for a PoolLoad that does not exist: responses keep their order, so anything else would come first."""
        if not self._published:
            return  # nothing is answered yet; the first response will show whether anything was sent before it
        self._fences += 1
        await self.send(self.peer.subscribe(POOL_LOAD, f"fence-{self._fences}"))
        response = await self.receive()
        assert (response.type_url, list(response.resources)) == (POOL_LOAD, [])
        await self.send(self.peer.ack(response))

    async def reconnect(self) -> None:
        self.peer.names.pop(POOL_LOAD, None)
        await self._client.reconnect()


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_scenario(served: Served, connect: Any, scenario: Any, peer: Any) -> None:
    """Each rule of the protocol holds over gRPC as it does over the pure objects."""
    await scenario(WireLink(served, await connect(peer())))


class OneTypeLink(WireLink):
    """The same on the service for one type, which answers nothing about another: silence is counted on the server."""

    def __init__(self, served: Served, client: AdsClient) -> None:
        super().__init__(served, client)
        self._sent = self._received = 0

    async def send(self, *requests: Any) -> None:
        self._sent += len(requests)
        await super().send(*requests)

    async def receive(self) -> Any:
        self._received += 1
        return await super().receive()

    async def quiet(self) -> None:
        """Every request has been taken, and the server's loop has turned since; then compare the responses."""
        async with asyncio.timeout(PATIENCE), grpc.aio.insecure_channel(self._served.address) as channel:
            check = channel.unary_unary(f"/{HEALTH}/Check")
            while self._served.total("vllm_xds_requests_total") < self._sent:
                await check(b"")
            await check(b"")
        assert self._served.total("vllm_xds_responses_total") == self._received

    async def reconnect(self) -> None:
        self._sent += len(self.peer.names)
        await super().reconnect()


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
@pytest.mark.parametrize(("scenario", "only"), OF_ONE_TYPE, ids=lambda value: getattr(value, "__name__", ""))
async def test_scenario_of_one_type(served: Served, connect: Any, peer: Any, scenario: Any, only: str) -> None:
    """CDS, EDS and RDS each have a service of their own, with the same rules."""
    await scenario(OneTypeLink(served, await connect(peer(), OF_TYPE[only])))


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
async def test_listeners_have_a_service_too(served: Served, connect: Any, peer: Any) -> None:
    """LDS alone: the listeners and their changes, and clusters are not waited for."""
    link = OneTypeLink(served, await connect(peer(), OF_TYPE[LISTENER]))
    await link.publish(snapshot(**FULL))
    await link.send(link.peer.subscribe(LISTENER))
    await link.expect(LISTENER, {"l": "1"})
    await link.publish(snapshot(**FULL | {"cds": {"c": "1"}, "lds": {"m": "1"}}))
    await link.expect(LISTENER, {"m": "1"}, {"l"})
    await link.quiet()


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
async def test_every_client_is_brought_to_the_newest_snapshot(served: Served, connect: Any, peer: Any) -> None:
    """One publish reaches all clients; `wait_settled` returns when the last has accepted, `clients` shows it."""
    clients = [await connect(peer(f"envoy-{i}")) for i in range(3)]
    served.server.publish(snapshot(cds={"a": "1"}))
    for client in clients:
        await client.send(client.peer.subscribe(CLUSTER))
        await client.send(client.peer.ack(await client.receive()))
    async with asyncio.timeout(PATIENCE):
        await served.server.wait_settled(clients=3)
    second = snapshot(cds={"a": "2"})
    served.server.publish(second)
    waiting = asyncio.create_task(served.server.wait_settled(clients=3))
    for client in clients:
        assert not waiting.done()
        await client.send(client.peer.ack(await client.receive()))
    async with asyncio.timeout(PATIENCE):
        await waiting
    views = served.server.clients()
    assert [view.node_id for view in views] == ["envoy-0", "envoy-1", "envoy-2"]
    for view in views:
        assert (view.variant, view.node_cluster) == (peer.variant, "test")
        (clusters,) = view.types
        assert clusters.version_sent == clusters.version_acked == second.versions[CLUSTER]
    assert served.value("vllm_xds_streams", variant=peer.variant) == 3
    assert served.value("vllm_xds_responses_total", type="Cluster") == 6
    assert served.value("vllm_xds_requests_total", type="Cluster", kind="ack") == 6


@pytest.mark.parametrize("peer", PEERS, ids=["sotw", "delta"])
async def test_each_group_is_served_its_own(served: Served, connect: Any, peer: Any) -> None:
    """A client is in the group its node names, by cluster or id, and is served that group's listeners alone; when the
    groups change it is brought to the new one. One that has no listener is warned of."""
    made = {LISTENER: [resource(LISTENER, name) for name in "abc"]}
    served.server.publish(Snapshot.of(made, {"": ["a"], "test": ["a", "b"], "envoy-2": ["c"], "none": []}))
    by_cluster, by_id, other, empty = [await connect(peer(f"envoy-{i}")) for i in range(1, 5)]
    for client, cluster in ((by_id, "x"), (other, "x"), (empty, "none")):
        client.peer.node.cluster = cluster
    with structlog.testing.capture_logs() as logs:
        for client, names in ((by_cluster, "ab"), (by_id, "c"), (other, "a"), (empty, "")):
            await client.send(client.peer.subscribe(LISTENER))
            await client.send(client.peer.ack(await client.receive()))
            assert "".join(client.peer.held[LISTENER]) == names
        async with asyncio.timeout(PATIENCE):
            await served.server.wait_settled(clients=4)
    assert [view.group for view in served.server.clients()] == ["test", "envoy-2", "", "none"]
    (warning,) = [line for line in logs if line["event"] == "client without gateway"]
    assert (warning["node"], warning["cluster"], warning["groups"]) == (
        "envoy-4",
        "none",
        ["envoy-2", "none", "test"],
    )

    served.server.publish(Snapshot.of(made, {"": ["a"], "envoy-2": ["c"], "none": ["b"]}))
    for client, names in ((by_cluster, "a"), (empty, "b")):
        await client.send(client.peer.ack(await client.receive()))
        assert "".join(client.peer.held[LISTENER]) == names
    async with asyncio.timeout(PATIENCE):
        await served.server.wait_settled(clients=4)
    assert served.value("vllm_xds_responses_total", type="Listener") == 4 + 2


async def test_refusal_is_logged_counted_and_shown(served: Served, connect: Any) -> None:
    """A NACK is a log event with node, type, version, nonce and the client's message; a metric; and in the view."""
    with structlog.testing.capture_logs() as logs:
        client = await connect(DeltaPeer("envoy-7"))
        bad = snapshot(cds={"a": "bad"})
        served.server.publish(bad)
        await client.send(client.peer.subscribe(CLUSTER))
        await client.send(client.peer.nack(await client.receive(), "no such filter"))
        async with asyncio.timeout(PATIENCE):
            await served.server.wait_settled()
    (event,) = [line for line in logs if line["event"] == "response refused"]
    assert dict(event) | {"peer": "", "nonce": ""} == {
        "event": "response refused",
        "log_level": "warning",
        "variant": "delta",
        "peer": "",
        "node": "envoy-7",
        "type": "Cluster",
        "version": bad.versions[CLUSTER],
        "nonce": "",
        "resources": 1,
        "names": ("a",),
        "message": "no such filter",
    }
    assert served.value("vllm_xds_nacks_total", type="Cluster") == 1
    ((view,),) = [client.types for client in served.server.clients()]
    assert (view.refused, view.last_nack, view.version_acked) == (("a",), "no such filter", "")


async def test_connection_and_snapshot_are_logged(served: Served, connect: Any) -> None:
    """Connecting, disconnecting and publishing are one event each; nothing is logged at info for a request."""
    with structlog.testing.capture_logs() as logs:
        client = await connect(SotwPeer("envoy-7"))
        served.server.publish(snapshot(**FULL))
        await client.send(client.peer.subscribe(CLUSTER))
        await client.send(client.peer.ack(await client.receive()))
        async with asyncio.timeout(PATIENCE):
            await served.server.wait_settled()
        await client.call.done_writing()
        with pytest.raises(EOFError):
            await client.receive()
    events = [line["event"] for line in logs if line["log_level"] != "debug"]
    assert events == ["snapshot published", "client connected", "client disconnected"]
    assert served.value("vllm_xds_streams", variant="sotw") == 0
    assert served.server.clients() == ()


async def test_garbage_costs_only_its_own_stream(served: Served, connect: Any) -> None:
    """Bytes that are no request end that stream with INVALID_ARGUMENT; another client notices nothing."""
    good = await connect(DeltaPeer())
    served.server.publish(snapshot(cds={"a": "1"}))
    async with grpc.aio.insecure_channel(served.address) as channel:
        for method in ("StreamAggregatedResources", "DeltaAggregatedResources"):
            call = channel.stream_stream(f"/{ADS}/{method}")()
            await call.write(b"\xff\xff\xff\xff")
            async with asyncio.timeout(PATIENCE):
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    await good.send(good.peer.subscribe(CLUSTER))
    await good.send(good.peer.ack(await good.receive()))
    async with asyncio.timeout(PATIENCE):
        await served.server.wait_settled()


async def test_too_many_names_cost_the_stream(connect: Any) -> None:
    """A client that subscribes without bound is cut off with RESOURCE_EXHAUSTED."""
    client = await connect(DeltaPeer())
    half = MAX_NAMES // 2 + 1
    await client.send(client.peer.subscribe(ENDPOINT, *map(str, range(half))))
    await client.send(client.peer.subscribe(ENDPOINT, *map(str, range(half, 2 * half))))
    async with asyncio.timeout(PATIENCE):
        assert await client.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_stream_that_asks_for_nothing_is_closed() -> None:
    """It ends after a while with DEADLINE_EXCEEDED; one that has asked stays, however long it is silent after that."""
    server = ManagementServer(Metrics(), first_request=0.1)
    (port,) = await server.start(["127.0.0.1:0"])
    server.publish(snapshot(cds={"a": "1"}))
    try:
        async with (
            AdsClient(f"127.0.0.1:{port}", DeltaPeer()) as good,
            AdsClient(f"127.0.0.1:{port}", DeltaPeer()) as silent,
        ):
            await good.send(good.peer.subscribe(CLUSTER))
            await good.receive()
            await silent.call.wait_for_connection()
            async with asyncio.timeout(PATIENCE):
                assert await silent.call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await good.send(good.peer.subscribe(ENDPOINT, "none"))
            assert (await good.receive()).type_url == ENDPOINT
            assert len(server.clients()) == 1
    finally:
        await server.stop(grace=0.1)


async def test_a_stuck_client_slows_nobody(served: Served, connect: Any) -> None:
    """A client that neither reads nor answers gets one response however much is published; the other gets it all."""
    stuck, good = await connect(DeltaPeer("stuck")), await connect(DeltaPeer("good"))
    served.server.publish(_endpoints("0"))
    for client in (stuck, good):
        await client.send(client.peer.subscribe(ENDPOINT, "a"))
    await good.send(good.peer.ack(await good.receive()))
    for revision in range(1, 21):
        served.server.publish(_endpoints(str(revision)))
        await good.send(good.peer.ack(await good.receive()))
    assert good.peer.revisions(ENDPOINT) == {"a": "x" * 100_000 + "20"}
    await stuck.send(stuck.peer.ack(await stuck.receive()))
    await stuck.send(stuck.peer.ack(await stuck.receive()))
    assert stuck.peer.revisions(ENDPOINT) == {"a": "x" * 100_000 + "20"}
    async with asyncio.timeout(PATIENCE):
        await served.server.wait_settled(clients=2)
    assert served.value("vllm_xds_responses_total", type="ClusterLoadAssignment") == 21 + 2


def _endpoints(revision: str) -> Snapshot:
    return Snapshot.of({ENDPOINT: [resource(ENDPOINT, "a", "x" * 100_000 + revision)]})


async def test_restarted_server_resends_nothing(served: Served, connect: Any) -> None:
    """A delta client that moves to a second server with equal content is sent empty answers alone."""
    client = await connect(DeltaPeer())
    served.server.publish(snapshot(**FULL))
    await client.send(client.peer.subscribe(CLUSTER))
    await client.send(client.peer.ack(await client.receive()))
    second = ManagementServer(Metrics())
    (port,) = await second.start(["127.0.0.1:0"])
    second.publish(snapshot(**FULL))
    async with AdsClient(f"127.0.0.1:{port}", client.peer) as moved:
        await moved.reconnect()
        response = await moved.receive()
        assert (list(response.resources), list(response.removed_resources)) == ([], [])
    await second.stop(grace=0.1)


async def test_stand_ins_are_logged(served: Served, connect: Any) -> None:
    """A SotW client that comes back with an unknown cluster is one event, which names it; the next change is none."""
    client = await connect(SotwPeer("envoy-7"))
    peer = client.peer
    peer.names, peer.versions = {CLUSTER: set(), ENDPOINT: {"gone"}}, {CLUSTER: "of another server"}
    served.server.publish(snapshot(cds={"a": "1"}))
    with structlog.testing.capture_logs() as logs:
        await client.send(*peer.reconnect())
        for revision in "123":
            served.server.publish(snapshot(cds={"a": revision}))
            await client.send(peer.ack(await client.receive()))
    events = [line for line in logs if line["event"] == "stand-ins sent"]
    assert [(line["node"], line["clusters"], line["names"]) for line in events] == [("envoy-7", 1, ("gone",))]


async def test_stop_ends_the_streams(served: Served, connect: Any) -> None:
    """A stopping server ends its streams, so that clients go elsewhere at once; its port is free again."""
    client = await connect(SotwPeer())
    served.server.publish(snapshot(cds={"a": "1"}))
    await client.send(client.peer.subscribe(CLUSTER))
    await client.receive()
    await served.server.stop(grace=5)
    with pytest.raises(EOFError):
        await client.receive()


async def test_busy_port_is_an_error(served: Served) -> None:
    """A second server on the same port does not start, and does not take half of the clients."""
    with pytest.raises(RuntimeError):
        await ManagementServer(Metrics()).start([served.address])


async def test_health(served: Served) -> None:
    """grpc.health.v1 says serving once there is something to serve."""
    async with grpc.aio.insecure_channel(served.address) as channel:
        check = channel.unary_unary(f"/{HEALTH}/Check")
        assert await check(b"") == NOT_SERVING
        served.server.publish(snapshot())
        assert await check(b"") == SERVING
