"""picker/loads.py: the delta ADS client, against a small server that speaks the real wire."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf, nan
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from picker import loads as loads_module
from picker.cost import STALE, Costs, PodLoad, PoolLoad
from picker.loads import CONFIG, LOAD, MAX_REFUSAL, METHOD, LoadsClient, Subscription, decode, watch
from picker.metrics import PickerMetrics
from picker.models import Models, Rule
from picker.pick import Picker, PoolConfig
from xds.wire import discovery_pb2 as wire
from xds.wire.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource
from xds.wire.load_pb2 import EndpointLoad, InFlight
from xds.wire.load_pb2 import PoolLoad as WirePoolLoad
from xds.wire.pool_config_pb2 import Costs as WireCosts
from xds.wire.pool_config_pb2 import ModelRule, Objective, Saturation, Target
from xds.wire.pool_config_pb2 import PoolConfig as WirePoolConfig

POOL = "pool/default/qwen"


def resource(name: str = POOL, version: str = "1", **endpoint: Any) -> Resource:
    load = WirePoolLoad(name=name, endpoints=[EndpointLoad(**{"hash_key": "default/a"} | endpoint)])
    return Resource(name=name, version=version, resource=wire.Any(type_url=LOAD, value=load.SerializeToString()))


def response(nonce: str, *resources: Resource, removed: tuple[str, ...] = ()) -> DeltaDiscoveryResponse:
    return DeltaDiscoveryResponse(
        type_url=LOAD,
        nonce=nonce,
        resources=[one.SerializeToString() for one in resources],
        removed_resources=removed,
    )


def config(**costs: float) -> WirePoolConfig:
    return WirePoolConfig(name=POOL, costs=WireCosts(**costs))


def config_response(nonce: str, made: WirePoolConfig, version: str = "1") -> DeltaDiscoveryResponse:
    body = wire.Any(type_url=CONFIG, value=made.SerializeToString())
    one = Resource(name=made.name, version=version, resource=body)
    return DeltaDiscoveryResponse(type_url=CONFIG, nonce=nonce, resources=[one.SerializeToString()])


class FakeServer:
    """An ADS server whose test sends responses by hand; `requests` has what clients said."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[DeltaDiscoveryRequest] = asyncio.Queue()
        self.responses: asyncio.Queue[bytes | None] = asyncio.Queue()  # None ends the stream

    async def start(self, address: str = "127.0.0.1:0") -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(self._stream)
        service, method = METHOD.removeprefix("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port(address)}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def _stream(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async def read() -> None:
            async for data in requests:
                self.requests.put_nowait(DeltaDiscoveryRequest.FromString(data))

        reader = asyncio.create_task(read())
        try:
            while (data := await self.responses.get()) is not None:
                await context.write(data)
        finally:
            reader.cancel()

    def send(self, message: DeltaDiscoveryResponse) -> None:
        self.responses.put_nowait(message.SerializeToString())

    async def request(self) -> DeltaDiscoveryRequest:
        async with asyncio.timeout(20):
            return await self.requests.get()

    async def opened(self) -> DeltaDiscoveryRequest:
        """The request for loads a new stream begins with; that for settings comes just before it."""
        config, load = await self.request(), await self.request()
        assert (config.type_url, load.type_url) == (CONFIG, LOAD)
        assert config.node == load.node
        return load


class Follower:
    """A client at work, with the picker it informs."""

    def __init__(self, address: str) -> None:
        self.waits = asyncio.Semaphore(0)
        self.picker = Picker(lambda: 0.0)
        self.metrics = PickerMetrics()
        self.client = LoadsClient(
            address, self.picker, self.metrics, node_id="picker-1", clock=lambda: 100.0, random=self._wait
        )

    def _wait(self) -> float:
        """The client asks for randomness when it is about to wait for its next attempt."""
        self.waits.release()
        return 1.0

    @property
    def connected(self) -> float | None:
        return self.metrics.registry.get_sample_value("vllm_xds_picker_server_connected")


@asynccontextmanager
async def following(server: FakeServer) -> AsyncIterator[Follower]:
    follower = Follower(server.address)
    task = asyncio.create_task(follower.client.run())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.wait([task])
        await server.stop()


async def test_a_wildcard_subscription_that_acks() -> None:
    """The first request names the node and asks for everything; each response is ACKed by its nonce alone, once."""
    server = FakeServer()
    await server.start()
    async with following(server) as follower:
        first = await server.opened()
        assert first.node.id == "picker-1"
        assert not first.resource_names_subscribe
        assert not first.initial_resource_versions
        for nonce in ("n1", "n2"):
            server.send(response(nonce, resource(version=nonce, age=2.0)))
            assert await server.request() == DeltaDiscoveryRequest(type_url=LOAD, response_nonce=nonce)
            assert follower.picker.read_at() == {POOL: 98.0}
        assert follower.connected == 1
        server.send(response("n3", removed=(POOL, "never known")))
        assert (await server.request()).response_nonce == "n3"
        assert follower.picker.read_at() == {}
        assert server.requests.empty()  # and nothing more is sent


async def test_it_reconnects_with_what_it_has() -> None:
    """After the stream's end, and after the server's: the versions held are named, the loads stay, and it is logged."""
    server = FakeServer()
    await server.start()
    with capture_logs() as logs:
        async with following(server) as follower:
            await server.opened()
            server.send(response("n1", resource(version="7"), resource("pool/default/llama", "8")))
            await server.request()
            server.send(response("n2", removed=("pool/default/llama",)))
            await server.request()
            server.send(config_response("n3", config(output_tokens=5.0), version="9"))
            await server.request()
            server.responses.put_nowait(None)
            config_again, again = await server.request(), await server.request()
            assert again.node.id == config_again.node.id == "picker-1"
            assert dict(again.initial_resource_versions) == {POOL: "7"}
            assert dict(config_again.initial_resource_versions) == {POOL: "9"}
            await server.stop()
            assert list(follower.picker.read_at()) == [POOL]
            await server.start(server.address)
            assert dict((await server.opened()).initial_resource_versions) == {POOL: "7"}
    events = [line["event"] for line in logs]  # a server that is stopping may take a connection once more
    assert len(events) >= 5
    assert events == ["server connected", "server lost"] * (len(events) // 2) + ["server connected"]


async def test_a_server_that_is_not_there_yet() -> None:
    """Said once, not at each attempt; found when it comes."""
    server = FakeServer()
    await server.start()
    await server.stop()
    with capture_logs() as logs:
        async with following(server) as follower, asyncio.timeout(20):
            for _ in range(2):
                await follower.waits.acquire()
            await server.start(server.address)
            await server.opened()
    assert [line["event"] for line in logs] == ["server unreachable", "server connected"]


async def test_a_bad_resource_is_refused_and_the_good_one_beside_it_counts() -> None:
    """NACK with a reason, logged once however often it comes; its version is not held; the stream goes on."""
    server = FakeServer()
    await server.start()
    with capture_logs() as logs:
        async with following(server) as follower:
            await server.opened()
            for nonce in ("n1", "n2"):
                server.send(response(nonce, resource("pool/default/bad", running=-1.0), resource()))
                nack = await server.request()
                assert nack.response_nonce == nonce
                assert nack.error_detail.code == 3
                assert nack.error_detail.message == "pool/default/bad: default/a: running is -1.0"
            assert list(follower.picker.read_at()) == [POOL]
            server.send(config_response("n3", config(prefill_rate=nan)))
            nack = await server.request()
            assert (nack.type_url, nack.response_nonce) == (CONFIG, "n3")
            assert nack.error_detail.message == f"{POOL}: prefill_rate is nan"
            server.responses.put_nowait(None)
            assert dict((await server.opened()).initial_resource_versions) == {POOL: "1"}
    events = [line["event"] for line in logs]
    assert (events.count("load report refused"), events.count("pool config refused")) == (1, 1)


async def test_settings_are_taken_and_taken_back() -> None:
    """A pool's settings count from their response on; without them the defaults do."""
    server = FakeServer()
    await server.start()
    async with following(server) as follower:
        await server.opened()
        server.send(response("n1", resource("other")))
        await server.request()
        for nonce, given, costs in (
            ("n2", config(output_tokens=50.0, prefill_rate=7.0, request_cost=0.0), Costs(50.0, 7.0, 0.0)),
            ("n3", config(request_cost=9.0), Costs(request_cost=9.0)),
        ):
            server.send(config_response(nonce, given))
            assert await server.request() == DeltaDiscoveryRequest(type_url=CONFIG, response_nonce=nonce)
            assert follower.picker.config(POOL) == PoolConfig(POOL, costs)
        server.send(DeltaDiscoveryResponse(type_url=CONFIG, nonce="n4", removed_resources=[POOL]))
        await server.request()
        assert follower.picker.config(POOL) is None
        assert list(follower.picker.read_at()) == ["other"]


def test_models_arrive() -> None:
    """Every rule with its targets, the objectives, and what saturates the pool; the defaults where nothing is said."""
    wire_config = WirePoolConfig(
        name=POOL,
        unpicked=True,
        models=[
            ModelRule(name="m", targets=[Target(name="a", weight=9), Target(name="b", weight=1)]),
            ModelRule(name="n", sheddable=True),
            ModelRule(name="", critical=True),
        ],
        closed=True,
        objectives=[Objective(name="low", priority=-1)],
        saturation=Saturation(waiting=7.0),
    )
    made = wire.Any(type_url=CONFIG, value=wire_config.SerializeToString())
    rules = {"m": Rule((("a", 9), ("b", 1))), "n": Rule(sheddable=True), "": Rule(critical=True)}
    config = PoolConfig(POOL, picked=False, models=Models(rules, True, {"low": -1}, waiting=7.0))
    assert decode(Resource(name=POOL, resource=made), CONFIG) == config


@pytest.mark.parametrize(
    "bad",
    [
        {"saturation": Saturation(waiting=0.0)},
        {"saturation": Saturation(kv_usage=nan)},
        {"models": [ModelRule(name="m", targets=[Target(name="a")])]},
        {"models": [ModelRule(name="m", targets=[Target(weight=1)])]},
    ],
)
def test_impossible_models_are_refused(bad: dict[str, Any]) -> None:
    """No weight to share by, no name to ask for, nothing to compare a load with."""
    made = wire.Any(type_url=CONFIG, value=WirePoolConfig(name=POOL, **bad).SerializeToString())
    with pytest.raises(ValueError, match=POOL):
        decode(Resource(name=POOL, resource=made), CONFIG)


@pytest.mark.parametrize(
    "bad", [{"output_tokens": 0.0}, {"prefill_rate": -1.0}, {"prefill_rate": 0.0}, {"request_cost": inf}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    """What would make every pod cost the same, or nothing comparable."""
    made = wire.Any(type_url=CONFIG, value=config(**bad).SerializeToString())
    with pytest.raises(ValueError, match=POOL):
        decode(Resource(name=POOL, resource=made), CONFIG)


async def test_bytes_that_are_no_response_end_the_stream_only() -> None:
    """A server that speaks something else is left, and tried again."""
    server = FakeServer()
    await server.start()
    async with following(server):
        await server.opened()
        server.responses.put_nowait(b"\xff\xff\xff")
        assert (await server.opened()).node.id == "picker-1"


def test_another_type_is_refused() -> None:
    """A response nobody asked for is NACKed under its own type and changes nothing."""
    outcome = Subscription("me").receive(DeltaDiscoveryResponse(type_url="other", nonce="n", resources=[b"\xff"]))
    assert outcome.request.type_url == "other"
    assert outcome.request.error_detail.message == "type other was not asked for"
    assert (outcome.values, outcome.removed) == ((), ())


@pytest.mark.parametrize(
    "bad",
    [
        {"hash_key": ""},
        {"running": nan},
        {"waiting": inf},
        {"running": 1e308},
        {"kv_usage": -0.1},
        {"kv_usage": 1.01},
        {"age": nan},
        {"prefill_rate": -inf},
        {"start_time": -1.0},
    ],
)
def test_impossible_values_are_refused(bad: dict[str, Any]) -> None:
    """A NaN in a cost would make every comparison false; none gets in."""
    with pytest.raises(ValueError, match=POOL):
        decode(resource(**bad), LOAD)


def test_a_report_that_is_not_what_it_says() -> None:
    """Another name, another type, the same pod twice, bytes that are no message."""
    whole = resource()
    twice = WirePoolLoad(name=POOL, endpoints=[EndpointLoad(hash_key="a"), EndpointLoad(hash_key="a")])
    for broken in (
        Resource(name=POOL, resource=wire.Any(type_url=LOAD, value=b"\xff")),
        Resource(name="other", resource=whole.resource),
        Resource(resource=wire.Any(type_url=LOAD)),
        Resource(name=POOL, resource=wire.Any(type_url="other", value=whole.resource.value)),
        Resource(name=POOL, resource=wire.Any(type_url=LOAD, value=twice.SerializeToString())),
    ):
        outcome = Subscription("me").receive(response("n", broken))
        assert outcome.refusal
        assert outcome.values == ()


def test_a_refusal_is_bounded() -> None:
    """However many resources are bad, the NACK fits into a message the server takes."""
    outcome = Subscription("me").receive(response("n", *(resource("x" * 1000, running=-1.0) for _ in range(100))))
    assert len(outcome.refusal) == MAX_REFUSAL
    assert outcome.request.ByteSize() < 2 * MAX_REFUSAL


def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods and pools beyond MAX_PODS are refused; those that change or go make room for no more than they held."""
    monkeypatch.setattr(loads_module, "MAX_PODS", 4)
    held = Subscription("me")

    def told(*names: str, removed: tuple[str, ...] = ()) -> list[str]:
        return [load.name for load in held.receive(response("n", *map(resource, names), removed=removed)).values]

    assert told("a", "b", "c") == ["a", "b"]
    assert told("a", "c") == ["a"]
    assert told(removed=("a", "never known")) == []
    assert told("c", "d") == ["c"]
    assert set(held.open().initial_resource_versions) == {"b", "c"}


def test_every_field_arrives() -> None:
    """The picker's value has what the wire says."""
    fields: dict[str, Any] = {
        "address": "10.0.0.1:8000",
        "age": -1.0,
        "running": 1.0,
        "waiting": 2.0,
        "kv_usage": 0.5,
        "kv_tokens": 2**64 - 1,
        "prefill_rate": 3.0,
        "start_time": 4.0,
        "in_flight": 7,
        "max_lora": 3,
        "running_adapters": ("a", "b"),
        "waiting_adapters": ("c",),
    }
    assert decode(resource(**fields), LOAD) == PoolLoad(POOL, (PodLoad("default/a", **fields),))


@pytest.mark.parametrize("age", [0.0, 1.5])
def test_in_flight_has_an_age_or_is_unknown(age: float) -> None:
    """An age of 0 is one too; an impossible one is refused."""

    def with_age(value: float) -> Resource:
        body = WirePoolLoad(name=POOL, in_flight=InFlight(age=value)).SerializeToString()
        return Resource(name=POOL, resource=wire.Any(type_url=LOAD, value=body))

    assert decode(with_age(age), LOAD) == PoolLoad(POOL, (), age)
    assert decode(resource(), LOAD) == PoolLoad(POOL, (PodLoad("default/a"),))
    for bad in (-1.0, nan, inf):
        with pytest.raises(ValueError, match="in_flight"):
            decode(with_age(bad), LOAD)


async def test_staleness_is_said_when_it_changes() -> None:
    """One line when a pool's loads go stale and one when they are fresh again, and the age as a metric.

    A pool not read yet is given as long.
    """
    picker, metrics, now = Picker(lambda: 0.0), PickerMetrics(), 0.0
    picker.update(PoolLoad(POOL, (PodLoad("a", age=-1.0),)), 0.0)
    looks = asyncio.Queue[float]()

    def clock() -> float:
        looks.put_nowait(now)
        return now

    with capture_logs() as logs:
        task = asyncio.create_task(watch(picker, metrics, clock, every=0.001))
        for now in (1.0, STALE + 1, STALE + 2):
            while await looks.get() != now:
                pass
        picker.update(PoolLoad(POOL, (PodLoad("a"),)), STALE + 3)
        now = STALE + 3
        while await looks.get() != now:
            pass
        age = metrics.registry.get_sample_value("vllm_xds_picker_load_age_seconds", {"pool": POOL})
        picker.forget(POOL)
        now = STALE + 4
        while await looks.get() != now:
            pass
        await looks.get()
        task.cancel()
    assert [line["event"] for line in logs] == ["pool load stale", "pool load fresh"]
    assert age == 0.0
    assert metrics.registry.get_sample_value("vllm_xds_picker_load_age_seconds", {"pool": POOL}) is None
